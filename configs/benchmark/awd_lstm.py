"""The speed of the shape of AWD-LSTM (Merity et al. 2018, arXiv:1708.02182): 400, 1150, 1150, 400 with weight drop.

python -m launch.benchmark --config=configs/benchmark/awd_lstm.py

Word dropout, locked masks (the same for all steps of a segment) and weight drop are on, as in training on the Penn Treebank.
"""

from configs._common import finish
from lm.config import Config


def get_config(argument=""):
    config = Config()
    model = config.model
    model.architecture, model.layer_dims = "lstm", (1150, 1150, 400)
    model.word_dropout_rate, model.embedding_dropout_rate, model.dropout_rate, model.output_dropout_rate = 0.1, 0.4, 0.25, 0.4
    model.weight_drop_rate, model.variational_dropout = 0.5, True
    config.data.vocab_size, config.data.batch_size, config.data.seq_len = 10_000, 80, 70
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.clip_norm = "sgd", 30.0, 0.25
    config.compute_dtype = "bfloat16"
    return finish(config, argument)
