"""The LSTMs of Melis et al.: what is theirs (2018, arXiv:1707.05589, and 2020, arXiv:1909.01792), and the tuned one of 2018."""

from configs._common import steps_of
from lm.config import Config


def melis(config: Config, train_tokens: int, epochs: int) -> Config:
    """Capped input gates, skip connections, one mask of state dropout for a segment and new ones of all else for each token,
    Adam without a first moment; as their code has it, but for the state that it forgets once in a hundred steps.

    Args:
      config: of a stream of words; changed and returned.
      train_tokens: in the train split.
    """
    config.model.input_gate, config.model.skip_connections = "capped", True
    config.optimizer.name, config.optimizer.b1, config.optimizer.clip_norm = "adamw", 0.0, 10.0
    epoch, training = steps_of(config, train_tokens), config.training
    training.num_steps, training.evaluate_every_steps, training.log_every_steps = epochs * epoch, epoch, 200
    return config


def tuned_lstm(config: Config, train_tokens: int, num_layers: int, epochs: int) -> Config:
    """24M parameters, with the learning rate and dropout that their code lists as tuned for four layers on the Penn Treebank.

    Its penalty of 9.4e-5 on squares, part of the gradient there, is decay beside Adam's step here; how much of it and how long
    to wait for valid was chosen.

    Args:
      config, train_tokens: as `melis` takes them.
    """
    model, optimizer = melis(config, train_tokens, epochs).model, config.optimizer
    model.num_params, model.num_layers = 24_000_000, num_layers
    model.embedding_dropout_rate, model.dropout_rate = 0.68697, 0.31323
    model.state_dropout_rate, model.output_dropout_rate = 0.48479, 0.69626
    optimizer.learning_rate, optimizer.weight_decay = 0.003339, 0.01
    optimizer.schedule, optimizer.decay_factor, optimizer.plateau_patience = "plateau", 0.1, 8
    config.training.early_stopping = 20
    return config
