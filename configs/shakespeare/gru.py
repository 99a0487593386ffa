"""GRU on tiny Shakespeare, its carry running through the text.

python -m launch.train --config=configs/shakespeare/gru.py --config.data.path=/path/to/input.txt --workdir=runs/shakespeare_gru

Valid loss 1.538 nats per character after 2 min 34 s on two CPU cores (2026-11-24, Intel Xeon, JAX 0.10.2, seed 0).
"""

from configs._common import finish
from configs.shakespeare._budget import small_budget


def get_config(argument=""):
    config = small_budget("gru")
    config.model.num_layers = 1
    config.optimizer.learning_rate, config.optimizer.adam_learning_rate = 0.01, 0.01
    return finish(config, argument)
