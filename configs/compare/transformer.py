"""Transformer decoder on equal terms with the others of this folder; windows that start empty instead of a carried state."""

from configs._common import finish
from configs.compare._equal_terms import equal_terms


def get_config(argument=""):
    config = equal_terms("transformer")
    config.model.num_layers = 2
    config.data.order = "windows"
    config.data.batch_size, config.data.seq_len = 16, 128
    config.evaluation.context, config.evaluation.stride = 128, 32
    config.optimizer.learning_rate = 1e-2
    return finish(config, argument)
