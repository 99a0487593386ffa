"""What the compared models have in common: the text, the number of tokens, the budget of parameters, optimiser and schedule."""

from lm.config import Config

NUM_TOKENS = 2_000_000


def equal_terms(architecture: str) -> Config:
    """A neural model of 800,000 parameters that reads 2 million tokens, about three epochs of the built-in corpus."""
    config = Config()
    config.model.architecture = architecture
    config.model.num_params = 800_000
    config.model.dropout_rate = 0.05
    config.data.batch_size, config.data.seq_len = 32, 64
    config.optimizer.name = "muon"
    config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.final_fraction = "cosine", 100, 0.02
    config.training.num_steps = NUM_TOKENS // (config.data.batch_size * config.data.seq_len)
    config.training.log_every_steps, config.training.evaluate_every_steps = 25, 122
    return config
