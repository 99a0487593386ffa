"""The speed of a Transformer of 6 × 256 with 8 heads in steps of 8 × 128 tokens.

python -m launch.benchmark --config=configs/benchmark/transformer.py --against=torch
"""

from configs._common import finish
from lm.config import Config


def get_config(argument=""):
    config = Config()
    config.model.architecture, config.model.num_layers, config.model.hidden_dim = "transformer", 6, 256
    config.model.num_heads = 8
    config.data.vocab_size, config.data.order, config.data.batch_size, config.data.seq_len = 10_000, "windows", 8, 128
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 1e-3
    return finish(config, argument)
