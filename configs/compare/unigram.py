"""Unigram, counted on the train split: a baseline of the comparison."""

from configs._common import finish
from lm.config import Config


def get_config(argument=""):
    config = Config()
    config.model.architecture, config.model.ngram_order = "ngram", 1
    return finish(config, argument)
