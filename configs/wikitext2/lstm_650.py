"""The LSTM of PyTorch's word_language_model example on WikiText-2, 2 × 650 and tied. Its users report: test 86.68.

python -m launch.train --config=configs/wikitext2/lstm_650.py --config.data.path=/path/to/wikitext-2 --workdir=runs/wt2_lstm_650

Not yet run; a GPU's work: the example's 40 epochs. What differs: configs/_word_language_model.py.
"""

from configs._common import finish
from configs._word_language_model import word_language_model
from configs.wikitext2._text import TRAIN_TOKENS, wikitext2


def get_config(argument=""):
    config = word_language_model(wikitext2("lstm"), TRAIN_TOKENS, width=650, dropout_rate=0.5, epochs=40)
    return finish(config, argument)
