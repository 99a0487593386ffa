"""What the models share: the characters, 2,000 steps of 12 × 64 of them, and the number of parameters."""

from lm.config import Config


def small_budget(architecture: str) -> Config:
    """A model of 0.8 million parameters. The file is given as --config.data.path and is split 90/5/5."""
    config = Config()
    config.model.architecture = architecture
    config.model.num_params = 800_000
    config.data.source, config.data.path, config.data.tokenizer = "text", "data/tinyshakespeare/input.txt", "char"
    config.data.batch_size, config.data.seq_len = 12, 64
    config.optimizer.name = "muon"
    config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.final_fraction = "cosine", 100, 0.02
    config.training.num_steps = 2000
    config.training.log_every_steps, config.training.evaluate_every_steps = 50, 250
    return config
