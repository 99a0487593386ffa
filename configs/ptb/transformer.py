"""Transformer on the Penn Treebank, with the parameters and tokens of zaremba_small.py; windows that start empty.

python -m launch.train --config=configs/ptb/transformer.py --config.data.path=/path/to/ptb --workdir=runs/ptb_transformer
"""

from configs._common import finish
from configs.ptb._equal_terms import equal_terms


def get_config(argument=""):
    config = equal_terms("transformer", seq_len=140)
    config.data.order = "windows"
    config.evaluation.context, config.evaluation.stride = 140, 35
    return finish(config, argument)
