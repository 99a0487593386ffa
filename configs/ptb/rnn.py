"""RNN on the Penn Treebank, with the parameters and tokens of zaremba_small.py.

python -m launch.train --config=configs/ptb/rnn.py --config.data.path=/path/to/ptb --workdir=runs/ptb_rnn

Perplexity 139.99 on valid (13 epochs of 13, the best) and 130.34 on test, seed 0. 5,081 s on one core of an AMD EPYC that had
other work as well (2026-11-25, Python 3.11, JAX 0.10.2).
"""

from configs._common import finish
from configs.ptb._equal_terms import equal_terms


def get_config(argument=""):
    return finish(equal_terms("rnn"), argument)
