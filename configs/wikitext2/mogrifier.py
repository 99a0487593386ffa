"""Mogrifier LSTM on WikiText-2, 35M parameters (Melis et al. 2020, arXiv:1909.01792). Published: valid 57.3, test 55.1.

python -m launch.train --config=configs/wikitext2/mogrifier.py --config.data.path=/path/to/wikitext-2 --workdir=runs/wt2_mogrifier

Not yet run; a GPU's work: 250 epochs.
"""

from configs._common import finish
from configs._mogrifier import mogrifier
from configs.wikitext2._text import TRAIN_TOKENS, wikitext2


def get_config(argument=""):
    config = wikitext2("lstm", batch_size=64, seq_len=70)
    config.model.layer_dims, config.model.embed_dim = (1200, 1200), 430
    return finish(mogrifier(config, TRAIN_TOKENS, epochs=250), argument)
