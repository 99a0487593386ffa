"""What the experiments on WikiText-103 share: its words, in clusters by frequency."""

from lm.config import Config


def wikitext103(architecture: str, batch_size: int, seq_len: int) -> Config:
    """A model over the 267,735 words of WikiText-103 (Merity et al. 2017, arXiv:1609.07843), read as a stream, with an adaptive
    embedding and softmax in four clusters.

    The folder with its train, valid and test files is given as --config.data.path.
    """
    config = Config()
    config.model.architecture, config.model.cutoffs = architecture, (20_000, 40_000, 200_000)
    config.data.source, config.data.path, config.data.tokenizer = "text", "data/wikitext-103", "word"
    config.data.batch_size, config.data.seq_len = batch_size, seq_len
    return config
