"""RNN on the Penn Treebank, with the parameters and tokens of zaremba_small.py.

python -m launch.train --config=configs/ptb/rnn.py --config.data.path=/path/to/ptb --workdir=runs/ptb_rnn
"""

from configs._common import finish
from configs.ptb._equal_terms import equal_terms


def get_config(argument=""):
    return finish(equal_terms("rnn"), argument)
