"""Mogrifier LSTM (Melis et al. 2020, arXiv:1909.01792), for any corpus."""

from configs._melis import melis
from lm.config import Config


def mogrifier(config: Config, train_tokens: int, epochs: int, learning_rate: float, rates, patience: int = 10_000) -> Config:
    """What all corpora share: parameters averaged since valid stalls. As `melis`; decay was chosen.

    What differs further: the authors' code trains on words for 200,000 steps, averages at the latest after four fifths of all,
    and gives the gates between input and state biases, which the paper's equations lack.

    Args:
      patience: steps without a new best after which the mean begins.
    """
    melis(config, train_tokens, epochs, learning_rate, rates).optimizer.weight_decay = 3e-4
    config.training.averaging = "stall"
    config.training.averaging_patience = round(patience / config.training.evaluate_every_steps)
    return config
