"""The LSTM of lstm.py in five epochs, ten minutes on two CPU cores. Not tuned yet.

python -m launch.train --config=configs/ptb/lstm_10min.py --config.data.path=/path/to/ptb --workdir=runs/ptb_lstm_10min

Perplexity on valid 131.56 (quick look) after 604 s (2026-11-25, Intel Xeon, Python 3.11, JAX 0.10.2, seed 0): worse than what SGD
gives in that time; test was not scored.
"""

from configs._common import finish
from configs.ptb._budget import equal_budget


def get_config(argument=""):
    config = equal_budget("lstm", num_epochs=5)
    config.model.num_layers = 1
    config.model.dropout_rate = 0.25
    return finish(config, argument)
