"""The small GRU of the Penn Treebank, with the regularisers of the LSTM beside it.

python -m launch.train --config=configs/ptb/small/gru.py --config.data.path=/path/to/ptb --workdir=runs/ptb_small_gru

Not yet run.
"""

from configs._common import finish
from configs.ptb.small._recipe import recurrent, trained


def get_config(argument=""):
    config = recurrent("gru")
    config.optimizer.learning_rate = 0.005
    return finish(trained(config), argument)
