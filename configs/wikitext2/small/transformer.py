"""The small Transformer of WikiText-2: eight million parameters, the recipe of configs/_small.py.

python -m launch.train --config=configs/wikitext2/small/transformer.py --config.data.path=/path/to/wikitext-2 \
    --workdir=runs/wt2_small_transformer

Two cores of an AMD EPYC with AVX-512, with some other work beside it, Python 3.11.7, JAX 0.10.2, 2026-11-29, seed 0: 42 minutes,
valid 157.19, test 146.60 (windows 140, stride 35, float32, step 2,796).
"""

from configs._common import finish
from configs._small import small
from configs.wikitext2._text import TRAIN_TOKENS, wikitext2


def get_config(argument=""):
    return finish(small(wikitext2("transformer"), 8_000_000, TRAIN_TOKENS, epochs=3), argument)
