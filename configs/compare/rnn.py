"""RNN on equal terms with the others of this folder.

make compare

Perplexity valid 25.73, test 31.27 after 1 min 18 s, two CPU cores (2026-11-28, Intel Xeon, Python 3.11, JAX 0.10.2, seed 0).
"""

from configs._common import finish
from configs.compare._equal_terms import equal_terms


def get_config(argument=""):
    config = equal_terms("rnn")
    config.model.num_layers = 1
    config.optimizer.learning_rate = 0.005
    config.optimizer.weight_decay = 0.1
    return finish(config, argument)
