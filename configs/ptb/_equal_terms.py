"""What the models beside the LSTM of Zaremba et al. share: its parameters and tokens, optimiser and schedule."""

from configs.ptb._text import penn_treebank, steps_per_epoch
from lm.config import Config

TOKENS_PER_STEP = 700


def equal_terms(architecture: str, seq_len: int = 35) -> Config:
    """A model of as many parameters as zaremba_small.py, nine tenths of them over the vocabulary, for as many epochs.

    SGD, AdamW and Muon were tried with each architecture for two epochs; AdamW was the best of all three on valid:

    | valid perplexity after two epochs | RNN | GRU | Transformer |
    | --- | ---: | ---: | ---: |
    | SGD (5; GRU 20), clipped to 0.25 | 293.60 | 156.47 | 199.23 |
    | Muon (0.01; Adam's part 0.002; decay 0.1) | 245.29 | 175.33 | 186.74 |
    | AdamW (0.002) | 161.17 | 144.75 | 164.63 |
    """
    config = penn_treebank(architecture, TOKENS_PER_STEP // seq_len, seq_len)
    config.model.num_params, config.model.tie_embeddings = 4_651_600, False
    config.model.num_layers, config.model.dropout_rate = 2, 0.2
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 0.002
    config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.final_fraction = "cosine", 100, 0.02
    epoch = steps_per_epoch(config)
    config.training.num_steps, config.training.evaluate_every_steps = 13 * epoch, epoch
    config.training.log_every_steps = 200
    return config
