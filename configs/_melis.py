"""The LSTMs of Melis et al.: what is theirs (2018, arXiv:1707.05589, and 2020, arXiv:1909.01792), and the tuned one of 2018."""

from configs._common import steps_of
from lm.config import Config


def melis(
    config: Config, train_tokens: int, epochs: int, learning_rate: float, rates: tuple[float, float, float, float]
) -> Config:
    """Capped input gates, skip connections, one mask of state dropout for a segment and new ones of all else for each token,
    Adam without a first moment; as their code has it.

    What differs: that forgets its state once in a hundred steps, and its penalty on squares is part of the gradient, where
    decay of a weight chosen here stands beside Adam's step; and it also drops from the output after its projection. Its figures
    are with a temperature of the softmax tuned on valid.

    Args:
      config: of a stream of words; changed and returned.
      train_tokens: in the train split.
      rates: of dropout, on the embedding, between the layers, of the state and on the output.
    """
    model, optimizer, training = config.model, config.optimizer, config.training
    model.input_gate, model.skip_connections = "capped", True
    model.embedding_dropout_rate, model.dropout_rate, model.state_dropout_rate, model.output_dropout_rate = rates
    optimizer.name, optimizer.b1, optimizer.learning_rate = "adamw", 0.0, learning_rate
    optimizer.clip_norm = 10 / config.data.seq_len  # theirs is of a loss summed over the steps of a row
    epoch = steps_of(config, train_tokens)
    training.num_steps, training.evaluate_every_steps, training.log_every_steps = epochs * epoch, epoch, 200
    return config


def tuned_lstm(config: Config, train_tokens: int, epochs: int, learning_rate: float, rates) -> Config:
    """The LSTM of 2018; as `melis`. Decay was chosen, and how long valid stalls before the learning rate falls to a tenth."""
    optimizer = melis(config, train_tokens, epochs, learning_rate, rates).optimizer
    optimizer.weight_decay = 0.01
    optimizer.schedule, optimizer.decay_factor, optimizer.plateau_patience = "plateau", 0.1, 8
    config.training.early_stopping = 20
    return config
