"""The small LSTM of the Penn Treebank with the regularisers of AWD-LSTM (Merity et al. 2018, arXiv:1708.02182).

python -m launch.train --config=configs/ptb/small/lstm.py --config.data.path=/path/to/ptb --workdir=runs/ptb_small_lstm
"""

from configs._common import finish
from configs.ptb.small._recipe import recurrent, trained


def get_config(argument=""):
    config = recurrent("lstm")
    config.optimizer.learning_rate = 0.01
    return finish(trained(config), argument)
