"""The LSTM of zaremba_small.py in ten to fifteen minutes: a little dropout, four epochs, and a rate that falls from the third on.

python -m launch.train --config=configs/ptb/lstm_10min.py --config.data.path=/path/to/ptb --workdir=runs/ptb_lstm_10min

Test perplexity 110.89 after 734 s of training, where PyTorch's example (launch.word_language_model, six epochs) has 115.46 after
1,086 s, its looks at valid included: two cores of an AMD EPYC, one run after the other, 2026-11-25, Python 3.11, JAX 0.10.2,
torch 2.13.0, seed 0.
"""

from configs._common import finish
from configs.ptb._text import steps_per_epoch
from configs.ptb.zaremba_small import get_config as zaremba_small


def get_config(argument=""):
    config = zaremba_small()
    config.model.dropout_rate = 0.1
    config.optimizer.decay_start_epoch, config.optimizer.decay_factor = 2, 0.4
    config.training.num_steps = 4 * steps_per_epoch(config)
    return finish(config, argument)
