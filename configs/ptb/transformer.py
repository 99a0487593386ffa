"""Transformer decoder on the Penn Treebank, on equal terms with the others of this folder; windows that start empty.

python -m launch.train --config=configs/ptb/transformer.py --config.data.path=/path/to/ptb --workdir=runs/ptb_transformer

Not yet run to its end.
"""

from configs._common import finish
from configs.ptb._budget import equal_budget


def get_config(argument=""):
    config = equal_budget("transformer", seq_len=140)
    config.model.num_layers = 2
    config.model.dropout_rate = 0.3
    config.data.order = "windows"
    config.evaluation.context, config.evaluation.stride = 140, 35
    return finish(config, argument)
