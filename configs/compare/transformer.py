"""Transformer decoder on equal terms with the others of this folder."""

from configs._common import finish
from configs.compare._equal_terms import equal_terms


def get_config(argument=""):
    config = equal_terms("transformer")
    config.model.num_layers = 2
    config.model.attention_window = 64
    config.optimizer.learning_rate = 5e-3
    return finish(config, argument)
