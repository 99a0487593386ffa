"""What the recurrent shapes share: two layers of 650 and a vocabulary of 10,000, the medium model of Zaremba et al. 2014."""

from lm.config import Config


def recurrent(architecture: str) -> Config:
    """Without dropout, which a peer in another library would draw differently."""
    config = Config()
    config.model.architecture, config.model.num_layers, config.model.hidden_dim = architecture, 2, 650
    config.model.tie_embeddings = False
    config.data.vocab_size, config.data.batch_size, config.data.seq_len = 10_000, 20, 35
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.clip_norm = "sgd", 1.0, 0.25
    return config
