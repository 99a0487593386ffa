"""An LSTM as big as that of PyTorch's word_language_model with its defaults (4.65 million parameters), in eight epochs.

python -m launch.train --config=configs/ptb/lstm.py --config.data.path=/path/to/ptb --workdir=runs/ptb_lstm

Not yet run to its end.
"""

from configs._common import finish
from configs.ptb._text import penn_treebank, steps_per_epoch


def get_config(argument=""):
    config = penn_treebank("lstm", batch_size=32, seq_len=35)
    config.model.num_layers, config.model.num_params = 1, 4_650_000
    config.model.dropout_rate = 0.4
    config.optimizer.name, config.optimizer.weight_decay = "muon", 0.3
    config.optimizer.learning_rate, config.optimizer.adam_learning_rate = 0.01, 0.01
    config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.final_fraction = "cosine", 100, 0.02
    epoch = steps_per_epoch(config)
    config.training.num_steps, config.training.evaluate_every_steps = 8 * epoch, epoch
    return finish(config, argument)
