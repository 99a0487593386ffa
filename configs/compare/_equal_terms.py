"""What the compared models have in common: the text, the number of tokens, the budget of parameters, optimiser and schedule."""

from lm.config import Config

NUM_STEPS, TOKENS_PER_STEP = 960, 2048


def equal_terms(architecture: str) -> Config:
    """A neural model of 800,000 parameters that reads 2 million tokens, about three epochs of the built-in corpus.

    In so few epochs decay of the matrices helps and dropout does not.
    """
    config = Config()
    config.model.architecture = architecture
    config.model.num_params = 800_000
    config.data.seq_len = 64
    config.data.batch_size = TOKENS_PER_STEP // config.data.seq_len
    config.optimizer.name, config.optimizer.weight_decay = "muon", 0.3
    config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.final_fraction = "cosine", 100, 0.02
    config.training.num_steps = NUM_STEPS
    config.training.log_every_steps, config.training.evaluate_every_steps = 30, 120
    return config
