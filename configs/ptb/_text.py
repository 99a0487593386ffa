"""What the experiments on the Penn Treebank share: its words, and how many steps an epoch has."""

from configs._common import steps_of
from lm.config import Config

TRAIN_TOKENS = 929_589


def penn_treebank(architecture: str, batch_size: int = 20, seq_len: int = 35) -> Config:
    """A model over the 10,000 words of the Penn Treebank (Mikolov's), read as a stream.

    The folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt is given as --config.data.path.
    """
    config = Config()
    config.model.architecture = architecture
    config.data.source, config.data.path, config.data.tokenizer = "text", "data/ptb", "word"
    config.data.batch_size, config.data.seq_len = batch_size, seq_len
    return config


def steps_per_epoch(config: Config) -> int:
    """Steps that a stream of the config's batches takes through train."""
    return steps_of(config, TRAIN_TOKENS)
