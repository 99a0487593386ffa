"""What the compared models have in common: the text, its tokens and their number, the budget of parameters, the schedule."""

from lm.config import Config

NUM_TOKENS = 3_000_000


def equal_terms(architecture: str) -> Config:
    """A neural model of 600,000 parameters that reads 3 million tokens, about four and a half epochs of the built-in corpus."""
    config = Config()
    config.model.architecture = architecture
    config.model.num_params = 600_000
    config.data.batch_size, config.data.seq_len = 32, 32
    config.training.num_steps = NUM_TOKENS // (config.data.batch_size * config.data.seq_len)
    config.training.log_every_steps, config.training.evaluate_every_steps = 50, 366
    config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.final_fraction = "cosine", 100, 0.02
    return config
