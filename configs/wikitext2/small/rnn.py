"""The small RNN of WikiText-2: eight million parameters, the recipe of configs/_small.py.

python -m launch.train --config=configs/wikitext2/small/rnn.py --config.data.path=/path/to/wikitext-2 \
    --workdir=runs/wt2_small_rnn

Two cores of an AMD EPYC with AVX-512, with some other work beside it, Python 3.11.7, JAX 0.10.2, 2026-11-29, seed 0: 48 minutes,
valid 199.77, test 184.05 (carried, float32, step 2,868).
"""

from configs._common import finish
from configs._small import small
from configs.wikitext2._text import TRAIN_TOKENS, wikitext2


def get_config(argument=""):
    return finish(small(wikitext2("rnn"), 8_000_000, TRAIN_TOKENS, epochs=3), argument)
