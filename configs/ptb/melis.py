"""The tuned LSTM of Melis et al. 2018, arXiv:1707.05589: 24M parameters in four layers. Published: valid 60.9, test 58.3.

python -m launch.train --config=configs/ptb/melis.py --config.data.path=/path/to/ptb --workdir=runs/ptb_melis

Not yet run; a GPU's work: 300 epochs.
"""

from configs._common import finish
from configs._melis import tuned_lstm
from configs.ptb._text import TRAIN_TOKENS, penn_treebank


def get_config(argument=""):
    return finish(tuned_lstm(penn_treebank("lstm", batch_size=64, seq_len=35), TRAIN_TOKENS, num_layers=4, epochs=300), argument)
