"""Mogrifier LSTM (Melis et al. 2020, arXiv:1909.01792), for any corpus."""

from configs._melis import melis
from lm.config import Config

_PATIENCE = 10_000  # steps without a new best


def mogrifier(config: Config, train_tokens: int, epochs: int, learning_rate: float, rates) -> Config:
    """What both corpora share: 70 steps, and parameters averaged since valid stalls. As `melis`; decay was chosen.

    What differs further: the authors' code trains for 200,000 steps, averages at the latest after four fifths of them, and
    gives the gates between input and state biases, which the paper's equations lack.
    """
    assert config.data.seq_len == 70
    melis(config, train_tokens, epochs, learning_rate, rates).optimizer.weight_decay = 3e-4
    config.training.averaging = "stall"
    config.training.averaging_patience = round(_PATIENCE / config.training.evaluate_every_steps)
    return config
