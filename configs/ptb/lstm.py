"""LSTM on the Penn Treebank, on equal terms with the others of this folder.

python -m launch.train --config=configs/ptb/lstm.py --config.data.path=/path/to/ptb --workdir=runs/ptb_lstm

Not yet run to its end.
"""

from configs._common import finish
from configs.ptb._budget import equal_budget


def get_config(argument=""):
    config = equal_budget("lstm")
    config.model.num_layers = 1
    config.model.dropout_rate = 0.4
    return finish(config, argument)
