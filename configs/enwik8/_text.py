"""What the experiments on enwik8 share: its bytes, and how many there are."""

from lm.config import Config

TRAIN_BYTES = 90_000_000


def enwik8(architecture: str, batch_size: int, seq_len: int) -> Config:
    """A model over the bytes of enwik8 (Hutter 2006, http://prize.hutter1.net), read as a stream.

    The folder with train.txt, its first 90 million bytes as they are, and valid.txt and test.txt, 5 million each, is given as
    --config.data.path. A character that a cut would part must be left whole. All 256 bytes are in the vocabulary, of which the
    text has 205.
    """
    config = Config()
    config.model.architecture = architecture
    config.data.source, config.data.path, config.data.tokenizer = "text", "data/enwik8", "byte"
    config.data.batch_size, config.data.seq_len = batch_size, seq_len
    return config
