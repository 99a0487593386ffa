"""Interpolated Kneser-Ney 5-gram, counted on the train split: a baseline of the comparison.

make compare

Perplexity valid 21.48, test 26.37 on two CPU cores (2026-11-24, Intel Xeon, Python 3.11, JAX 0.10.2, seed 0).
"""

from configs._common import finish
from lm.config import Config


def get_config(argument=""):
    config = Config()
    config.model.architecture, config.model.ngram_order = "ngram", 5
    return finish(config, argument)
