"""A small LSTM with the regularisers of AWD-LSTM (Merity et al. 2018, arXiv:1708.02182), for two CPU cores.

python -m launch.train --config=configs/ptb/awd_lstm_small.py --config.data.path=/path/to/ptb --workdir=runs/awd_lstm_small

Not yet run to its end: two of 20 epochs, valid 269.82 and 180.23. 2,940 tokens/s on two cores of an AMD EPYC with nothing beside
(2026-11-26, Python 3.11, JAX 0.10.2), which makes about 1 h 50 min of all of it.
"""

from configs._common import finish
from configs.ptb._text import penn_treebank, steps_per_epoch


def get_config(argument=""):
    config = penn_treebank("lstm", batch_size=20, seq_len=70)
    config.data.seq_len_std = 5.0
    config.model.layer_dims = (400, 240)
    config.model.variational_dropout = True
    config.model.word_dropout_rate, config.model.embedding_dropout_rate = 0.05, 0.25
    config.model.dropout_rate, config.model.output_dropout_rate, config.model.weight_drop_rate = 0.2, 0.3, 0.3
    config.training.activation_penalty, config.training.temporal_activation_penalty = 2.0, 1.0
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.weight_decay = "adamw", 0.003, 0.01
    config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.final_fraction = "cosine", 200, 0.01
    epoch = steps_per_epoch(config)
    config.training.num_steps, config.training.evaluate_every_steps = 20 * epoch, epoch
    config.training.log_every_steps = 200
    return finish(config, argument)
