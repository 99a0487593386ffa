"""Mogrifier LSTM on WikiText-2, 35M parameters, with a mixture of two softmaxes (Melis et al. 2020, arXiv:1909.01792).
Published: valid 57.3, test 55.1.

python -m launch.train --config=configs/wikitext2/mogrifier.py --config.data.path=/path/to/wikitext-2 --workdir=runs/wt2_mogrifier

Not yet run; a GPU's work: 250 epochs. Widths, rounds, rank, learning rate and dropout are those that the authors' code lists as
tuned.
"""

from configs._common import finish
from configs._mogrifier import mogrifier
from configs.wikitext2._text import TRAIN_TOKENS, wikitext2


def get_config(argument=""):
    config = wikitext2("lstm", batch_size=64, seq_len=70)
    config.model.layer_dims, config.model.embed_dim, config.model.num_softmaxes = (1367, 1367), 272, 2
    config.model.mogrifier_rounds, config.model.mogrifier_rank, config.model.softmax_dropout_rate = 6, 48, 0.34767
    rates = 0.54691, 0.19882, 0.22138, 0.34767
    return finish(mogrifier(config, TRAIN_TOKENS, epochs=250, learning_rate=0.0032878, rates=rates), argument)
