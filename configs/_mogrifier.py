"""Mogrifier LSTM (Melis et al. 2020, arXiv:1909.01792), for any corpus."""

from configs._melis import melis
from lm.config import Config


def mogrifier(config: Config, train_tokens: int, epochs: int) -> Config:
    """What the paper and its code state: two layers, tied through a down-projection, five rounds of gates of low rank, 70
    steps, averaged since valid stalls. It tuned the rest and does not list it: rates and widths here are within its ranges.

    Args:
      config: of a stream of words; changed and returned.
      train_tokens: in the train split.
    """
    model, optimizer = melis(config, train_tokens, epochs).model, config.optimizer
    model.mogrifier_rounds, model.mogrifier_rank, model.project_output = 5, 48, True
    model.embedding_dropout_rate, model.dropout_rate, model.output_dropout_rate, model.state_dropout_rate = 0.6, 0.3, 0.6, 0.3
    optimizer.learning_rate, optimizer.weight_decay = 0.003, 3e-4
    config.training.averaging = "stall"
    return config
