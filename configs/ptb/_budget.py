"""What the models on equal terms share: 4.65 million parameters, 13 epochs, optimiser and schedule."""

from configs.ptb._text import penn_treebank, steps_per_epoch
from lm.config import Config

NUM_EPOCHS = 13  # parameters and tokens are those of the small LSTM of Zaremba et al. 2014, zaremba_small.py
TOKENS_PER_STEP = 1120


def equal_budget(architecture: str, seq_len: int = 35, num_epochs: int = NUM_EPOCHS) -> Config:
    """A model of 4.65 million parameters, nine tenths of them in the two matrices over the vocabulary."""
    config = penn_treebank(architecture, TOKENS_PER_STEP // seq_len, seq_len)
    config.model.num_params, config.model.tie_embeddings = 4_651_600, False
    config.optimizer.name, config.optimizer.weight_decay = "muon", 0.3
    config.optimizer.learning_rate, config.optimizer.adam_learning_rate = 0.01, 0.01
    config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.final_fraction = "cosine", 100, 0.02
    epoch = steps_per_epoch(config)
    config.training.num_steps, config.training.evaluate_every_steps = num_epochs * epoch, epoch
    return config
