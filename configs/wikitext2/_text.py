"""What the experiments on WikiText-2 share: its words, and how many there are."""

from lm.config import Config

TRAIN_TOKENS = 2_088_628


def wikitext2(architecture: str, batch_size: int = 20, seq_len: int = 35) -> Config:
    """A model over the 33,278 words of WikiText-2 (Merity et al. 2017, arXiv:1609.07843), read as a stream.

    The folder with its train, valid and test files is given as --config.data.path.
    """
    config = Config()
    config.model.architecture = architecture
    config.data.source, config.data.path, config.data.tokenizer = "text", "data/wikitext-2", "word"
    config.data.batch_size, config.data.seq_len = batch_size, seq_len
    return config
