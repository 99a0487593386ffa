"""Interpolated Kneser-Ney 5-gram, counted on the train split: a baseline of the comparison."""

from configs._common import finish
from lm.config import Config


def get_config(argument=""):
    config = Config()
    config.model.architecture, config.model.ngram_order = "ngram", 5
    return finish(config, argument)
