"""Interpolated Kneser-Ney 5-gram on the Penn Treebank, as in Mikolov & Zweig 2012. Published: test 141.2.

python -m launch.train --config=configs/ptb/kneser_ney_5.py --config.data.path=/path/to/ptb --workdir=runs/ptb_kneser_ney_5

Perplexity valid 147.71, test 141.06, a second on two cores of an Intel Xeon (2026-11-28, Python 3.11, JAX 0.10.2).
"""

from configs._common import finish
from configs.ptb._text import penn_treebank
from lm.config import Config


def get_config(argument=""):
    unread = Config().data
    config = penn_treebank("ngram", unread.batch_size, unread.seq_len)
    config.model.ngram_order = 5
    return finish(config, argument)
