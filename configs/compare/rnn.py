"""RNN on equal terms with the others of this folder."""

from configs._common import finish
from configs.compare._equal_terms import equal_terms


def get_config(argument=""):
    config = equal_terms("rnn")
    config.model.num_layers = 1
    config.optimizer.learning_rate = 0.005
    config.optimizer.weight_decay = 0.1
    return finish(config, argument)
