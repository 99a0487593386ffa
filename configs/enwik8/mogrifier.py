"""Mogrifier LSTM on enwik8, 96M parameters (Melis et al. 2020, arXiv:1909.01792). Published: test 1.122 bits per byte.

python -m launch.train --config=configs/enwik8/mogrifier.py --config.data.path=/path/to/enwik8 --workdir=runs/enwik8_mogrifier

Not yet run; a GPU's work: 40,000 steps, 28 epochs. Rounds, rank, learning rate and dropout are those that the authors' code lists
as tuned.
"""

from configs._common import finish
from configs._mogrifier import mogrifier
from configs.enwik8._text import TRAIN_BYTES, enwik8


def get_config(argument=""):
    config = enwik8("lstm", batch_size=128, seq_len=500)
    config.model.num_params, config.model.num_layers, config.model.tie_embeddings = 96_000_000, 4, False
    config.model.mogrifier_rounds, config.model.mogrifier_rank = 5, 61
    rates = 0.01591, 0.13786, 0.16487, 0.28785
    mogrifier(config, TRAIN_BYTES, epochs=28, learning_rate=0.002248, rates=rates, patience=4000)
    config.training.num_steps = 40_000
    return finish(config, argument)
