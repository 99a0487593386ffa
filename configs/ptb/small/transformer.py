"""The small Transformer of the Penn Treebank: four million parameters, the recipe of configs/_small.py.

python -m launch.train --config=configs/ptb/small/transformer.py --config.data.path=/path/to/ptb \
    --workdir=runs/ptb_small_transformer

Perplexity valid 104.06, test 95.12 at epoch 14 of 25, the best. 3,837 s on two cores of an Intel Xeon with some work beside it
(2026-11-27, Python 3.11, JAX 0.10.2, seed 0).

Of three trials of two epochs this had the lowest perplexity on valid, 189.91; 0.001 had 206.72 and 0.004 had 208.24.
"""

from configs._common import finish
from configs._small import small
from configs.ptb._text import TRAIN_TOKENS, penn_treebank


def get_config(argument=""):
    return finish(small(penn_treebank("transformer"), 4_000_000, TRAIN_TOKENS, epochs=25), argument)
