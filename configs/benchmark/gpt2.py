"""The speed of GPT-2's smallest shape (Radford et al. 2019): 12 × 768, 12 heads, 1,024 positions; with the vocabulary of
50,257 that is named below, 124 million parameters.

python -m launch.benchmark --config=configs/benchmark/gpt2.py --vocab_size=50257 --against=torch
"""

from configs._common import finish
from lm.config import Config


def get_config(argument=""):
    config = Config()
    config.model.architecture, config.model.num_layers, config.model.hidden_dim = "transformer", 12, 768
    config.model.num_heads, config.model.activation, config.model.positions = 12, "gelu_tanh", "learned"
    config.data.order, config.data.batch_size, config.data.seq_len = "windows", 16, 1024
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.weight_decay = "adamw", 6e-4, 0.1
    config.compute_dtype = "bfloat16"
    return finish(config, argument)
