"""GRU on equal terms with the others of this folder.

make compare

Perplexity valid 20.03, test 24.89 after 1 min 24 s, two CPU cores (2026-11-28, Intel Xeon, Python 3.11, JAX 0.10.2, seed 0).
"""

from configs._common import finish
from configs.compare._equal_terms import equal_terms


def get_config(argument=""):
    config = equal_terms("gru")
    config.model.num_layers = 1
    config.optimizer.learning_rate, config.optimizer.adam_learning_rate = 0.015, 0.03
    return finish(config, argument)
