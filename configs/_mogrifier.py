"""Mogrifier LSTM (Melis et al. 2020, arXiv:1909.01792), for any corpus."""

from configs._common import steps_of
from lm.config import Config


def mogrifier(config: Config, train_tokens: int, epochs: int) -> Config:
    """What the paper states: two layers, tied through a down-projection, capped input gates, five rounds of gates of low rank,
    Adam without a first moment, 70 steps. It tuned the rest and does not list it: rates and widths here are within its ranges.

    Args:
      config: of a stream of words; changed and returned.
      train_tokens: in the train split.
    """
    model, optimizer, training = config.model, config.optimizer, config.training
    model.input_gate, model.mogrifier_rounds, model.mogrifier_rank = "capped", 5, 48
    model.project_output, model.variational_dropout = True, True
    model.embedding_dropout_rate, model.dropout_rate, model.output_dropout_rate, model.state_dropout_rate = 0.6, 0.3, 0.6, 0.3
    optimizer.name, optimizer.learning_rate, optimizer.b1, optimizer.clip_norm = "adamw", 0.003, 0.0, 10.0
    optimizer.weight_decay = 3e-4
    training.averaging = "stall"
    epoch = steps_of(config, train_tokens)
    training.num_steps, training.evaluate_every_steps, training.log_every_steps = epochs * epoch, epoch, 200
    return config
