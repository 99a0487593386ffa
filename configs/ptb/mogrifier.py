"""Mogrifier LSTM on the Penn Treebank, 24M parameters (Melis et al. 2020, arXiv:1909.01792). Published: valid 51.4, test 50.1.

python -m launch.train --config=configs/ptb/mogrifier.py --config.data.path=/path/to/ptb --workdir=runs/ptb_mogrifier

Not yet run; a GPU's work: 300 epochs. Rounds, rank, learning rate and dropout are those that the authors' code lists as tuned.
"""

from configs._common import finish
from configs._mogrifier import mogrifier
from configs.ptb._text import TRAIN_TOKENS, penn_treebank


def get_config(argument=""):
    config = penn_treebank("lstm", batch_size=64, seq_len=70)
    config.model.num_params, config.model.num_layers = 24_000_000, 2
    config.model.mogrifier_rounds, config.model.mogrifier_rank = 5, 84
    rates = 0.72908, 0.29098, 0.38729, 0.71567
    return finish(mogrifier(config, TRAIN_TOKENS, epochs=300, learning_rate=0.0023, rates=rates), argument)
