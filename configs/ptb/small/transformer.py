"""The small Transformer of the Penn Treebank, with the dropout of the LSTM beside it; windows that start empty.

python -m launch.train --config=configs/ptb/small/transformer.py --config.data.path=/path/to/ptb \
    --workdir=runs/ptb_small_transformer

Not yet run.
"""

from configs._common import finish
from configs.ptb.small._recipe import small, trained


def get_config(argument=""):
    config = small("transformer")
    config.model.attention_dropout_rate = 0.2
    config.data.order, config.data.seq_len, config.data.batch_size = "windows", 140, 16
    config.optimizer.learning_rate = 0.002
    config.evaluation.context, config.evaluation.stride = 140, 35
    return finish(trained(config), argument)
