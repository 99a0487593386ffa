"""The LSTM of lstm.py in few epochs: better than PyTorch's word_language_model of the same size, in less time.

python -m launch.train --config=configs/ptb/lstm_10min.py --config.data.path=/path/to/ptb --workdir=runs/ptb_lstm_10min

Not yet run to its end.
"""

from configs._common import finish
from configs.ptb._budget import equal_budget


def get_config(argument=""):
    config = equal_budget("lstm", num_epochs=5)
    config.model.num_layers = 1
    config.model.dropout_rate = 0.25
    return finish(config, argument)
