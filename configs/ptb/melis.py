"""The tuned LSTM of Melis et al. 2018, arXiv:1707.05589: 24M parameters in four layers. Published: valid 60.9, test 58.3.

python -m launch.train --config=configs/ptb/melis.py --config.data.path=/path/to/ptb --workdir=runs/ptb_melis

Not yet run; a GPU's work: 300 epochs. Learning rate and dropout are those that the authors' code lists as tuned.
"""

from configs._common import finish
from configs._melis import tuned_lstm
from configs.ptb._text import TRAIN_TOKENS, penn_treebank


def get_config(argument=""):
    config = penn_treebank("lstm", batch_size=64, seq_len=35)
    config.model.num_params, config.model.num_layers = 24_000_000, 4
    rates = 0.63364, 0.30913, 0.64275, 0.70086
    return finish(tuned_lstm(config, TRAIN_TOKENS, epochs=300, learning_rate=0.00396025, rates=rates), argument)
