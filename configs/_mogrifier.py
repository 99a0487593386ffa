"""Mogrifier LSTM (Melis et al. 2020, arXiv:1909.01792), for any corpus."""

from configs._melis import melis
from lm.config import Config

_PATIENCE = 48  # epochs; theirs waits 10,000 steps for a new best


def mogrifier(config: Config, train_tokens: int, epochs: int, learning_rate: float, rates) -> Config:
    """What both corpora share: 70 steps, and parameters averaged since valid stalls. As `melis`; decay was chosen."""
    assert config.data.seq_len == 70
    melis(config, train_tokens, epochs, learning_rate, rates).optimizer.weight_decay = 3e-4
    config.training.averaging, config.training.averaging_patience = "stall", _PATIENCE
    return config
