"""Transformer decoder on equal terms with the others of this folder; windows that start empty instead of a carry.

make compare

Perplexity valid 18.13, test 22.19 after 1 min 34 s, two CPU cores (2026-11-28, Intel Xeon, Python 3.11, JAX 0.10.2, seed 0).
"""

from configs._common import finish
from configs.compare._equal_terms import TOKENS_PER_STEP, equal_terms


def get_config(argument=""):
    config = equal_terms("transformer")
    config.model.num_layers = 2
    config.data.order = "windows"
    config.data.seq_len = 128
    config.data.batch_size = TOKENS_PER_STEP // config.data.seq_len
    config.evaluation.context, config.evaluation.stride = 128, 32
    config.optimizer.learning_rate, config.optimizer.adam_learning_rate = 0.01, 0.04
    return finish(config, argument)
