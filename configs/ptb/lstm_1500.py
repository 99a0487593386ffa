"""The LSTM of PyTorch's word_language_model example on the Penn Treebank, 2 × 1500 and tied. Its users report: test 72.30.

python -m launch.train --config=configs/ptb/lstm_1500.py --config.data.path=/path/to/ptb --workdir=runs/ptb_lstm_1500

Not yet run; a GPU's work: the example's 40 epochs. What differs: configs/_word_language_model.py.
"""

from configs._common import finish
from configs._word_language_model import word_language_model
from configs.ptb._text import TRAIN_TOKENS, penn_treebank


def get_config(argument=""):
    config = word_language_model(penn_treebank("lstm"), TRAIN_TOKENS, width=1500, dropout_rate=0.65, epochs=40)
    return finish(config, argument)
