"""The LSTMs of Zaremba et al. 2014, arXiv:1409.2329: two layers, SGD, a rate that falls from some epoch on."""

from configs.ptb._text import penn_treebank, steps_per_epoch
from lm.config import Config


def zaremba(
    width: int,
    *,
    init_scale: float,
    clip: float,
    epochs: int,
    full_epochs: int,
    decay: float,
    dropout_rate: float = 0.0,
    seq_len: int = 35,
) -> Config:
    """One of the three models.

    Args:
      clip: as in the paper, where losses are summed over the steps of a row and averaged over rows; its learning rate of 1 and
        its clip become `seq_len` and clip / seq_len on the mean per token that is differentiated here.
      epochs, full_epochs, decay: how many there are, how many of them at the full rate, and the factor on it in each later one.
    """
    config = penn_treebank("lstm", batch_size=20, seq_len=seq_len)
    config.model.num_layers, config.model.hidden_dim, config.model.dropout_rate = 2, width, dropout_rate
    config.model.tie_embeddings = False
    config.model.kernel_init = config.model.recurrent_init = config.model.embedding_init = "uniform"
    config.model.init_scale, config.model.forget_bias = init_scale, 0.0
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.clip_norm = "sgd", float(seq_len), clip / seq_len
    config.optimizer.schedule, config.optimizer.decay_start_epoch, config.optimizer.decay_factor = "step", full_epochs, decay
    epoch = steps_per_epoch(config)
    config.training.num_steps, config.training.evaluate_every_steps = epochs * epoch, epoch
    config.training.log_every_steps = 200
    return config
