"""LSTM on equal terms with the others of this folder."""

from configs._common import finish
from configs.compare._equal_terms import equal_terms


def get_config(argument=""):
    config = equal_terms("lstm")
    config.model.num_layers = 1
    config.optimizer.learning_rate, config.optimizer.adam_learning_rate = 0.015, 0.04
    return finish(config, argument)
