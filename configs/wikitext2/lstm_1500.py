"""The LSTM of PyTorch's word_language_model example on WikiText-2, 2 × 1500 and tied. Its users report: test 84.1.

python -m launch.train --config=configs/wikitext2/lstm_1500.py --config.data.path=/path/to/wikitext-2 --workdir=runs/wt2_lstm_1500

Not yet run; a GPU's work: the example's 40 epochs. What differs: configs/_word_language_model.py.
"""

from configs._common import finish
from configs._word_language_model import word_language_model
from configs.wikitext2._text import TRAIN_TOKENS, wikitext2


def get_config(argument=""):
    config = word_language_model(wikitext2("lstm"), TRAIN_TOKENS, width=1500, dropout_rate=0.65, epochs=40)
    return finish(config, argument)
