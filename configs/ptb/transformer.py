"""Transformer on the Penn Treebank, with the parameters and tokens of zaremba_small.py; windows that start empty.

python -m launch.train --config=configs/ptb/transformer.py --config.data.path=/path/to/ptb --workdir=runs/ptb_transformer

Perplexity 111.85 on valid (9 epochs of 13, the best) and 103.29 on test, seed 0. 7,602 s on one core of an AMD EPYC that had
other work as well (2026-11-25, Python 3.11, JAX 0.10.2).
"""

from configs._common import finish
from configs.ptb._equal_terms import equal_terms


def get_config(argument=""):
    config = equal_terms("transformer", seq_len=140)
    config.data.order = "windows"
    config.evaluation.context, config.evaluation.stride = 140, 35
    return finish(config, argument)
