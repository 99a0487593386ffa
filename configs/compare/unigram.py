"""Unigram, counted on the train split: a baseline of the comparison.

make compare

Perplexity valid 365.28, test 361.01 on two CPU cores (2026-11-24, Intel Xeon, Python 3.11, JAX 0.10.2, seed 0).
"""

from configs._common import finish
from lm.config import Config


def get_config(argument=""):
    config = Config()
    config.model.architecture, config.model.ngram_order = "ngram", 1
    return finish(config, argument)
