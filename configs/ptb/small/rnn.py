"""The small RNN of the Penn Treebank: four million parameters, the recipe of configs/_small.py.

python -m launch.train --config=configs/ptb/small/rnn.py --config.data.path=/path/to/ptb --workdir=runs/ptb_small_rnn

Not yet run.
"""

from configs._common import finish
from configs._small import small
from configs.ptb._text import TRAIN_TOKENS, penn_treebank


def get_config(argument=""):
    return finish(small(penn_treebank("rnn"), 4_000_000, TRAIN_TOKENS, epochs=25), argument)
