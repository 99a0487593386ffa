"""AWD-LSTM (Merity et al. 2018, arXiv:1708.02182), and with a mixture of softmaxes: the recipes, for any corpus."""

from configs._common import steps_of
from lm.config import Config


def awd_lstm(config: Config, train_tokens: int, epochs: int) -> Config:
    """The recipe of the paper's code, but for how parameters begin: three layers, tied, SGD at 30, averaged since valid stalls.

    Args:
      config: of a stream of words; changed and returned.
      train_tokens: in the train split.
    """
    model, optimizer, training = config.model, config.optimizer, config.training
    config.data.seq_len, config.data.seq_len_std = 70, 5.0
    model.layer_dims, model.variational_dropout = (1150, 1150, 400), True
    model.word_dropout_rate, model.weight_drop_rate, model.output_dropout_rate = 0.1, 0.5, 0.4
    training.activation_penalty, training.temporal_activation_penalty = 2.0, 1.0
    optimizer.name, optimizer.learning_rate, optimizer.clip_norm = "sgd", 30.0, 0.25
    optimizer.weight_decay, optimizer.decayed = 1.2e-6, "all"
    training.averaging = "stall"
    epoch = steps_of(config, train_tokens)
    training.num_steps, training.evaluate_every_steps, training.log_every_steps = epochs * epoch, epoch, 200
    return config


def awd_lstm_mos(config: Config, train_tokens: int, learning_rate: float) -> Config:
    """The same with a mixture of 15 softmaxes (Yang et al. 2018, arXiv:1711.03953), for 1,000 epochs; as `awd_lstm`."""
    awd_lstm(config, train_tokens, epochs=1000).optimizer.learning_rate = learning_rate
    config.model.num_softmaxes, config.model.softmax_dropout_rate = 15, 0.29
    return config
