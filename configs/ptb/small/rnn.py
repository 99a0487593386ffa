"""The small RNN of the Penn Treebank: four million parameters, the recipe of configs/_small.py.

python -m launch.train --config=configs/ptb/small/rnn.py --config.data.path=/path/to/ptb --workdir=runs/ptb_small_rnn

Perplexity valid 126.83, test 117.81. 2,982 s on two cores of an Intel Xeon (2026-11-27, Python 3.11, JAX 0.10.2, seed 0).

The only one of the four with a fourth trial of two epochs: the LSTM's whole recipe had 371.27 on valid at 0.004 and 352.37 at
0.002, at 0.001 it was given up after one epoch at 547.02; without dropped weights and penalties, at 0.002, it had 196.07.
"""

from configs._common import finish
from configs._small import small
from configs.ptb._text import TRAIN_TOKENS, penn_treebank


def get_config(argument=""):
    return finish(small(penn_treebank("rnn"), 4_000_000, TRAIN_TOKENS, epochs=25), argument)
