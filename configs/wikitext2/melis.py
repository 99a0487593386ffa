"""The tuned LSTM of Melis et al. 2018, arXiv:1707.05589, on WikiText-2: 24M parameters in two layers. Published: valid 69.1,
test 65.9.

python -m launch.train --config=configs/wikitext2/melis.py --config.data.path=/path/to/wikitext-2 --workdir=runs/wt2_melis

Not yet run; a GPU's work: 150 epochs. Dropout and learning rate, of which none is listed for this corpus, are those of
configs/ptb/melis.py.
"""

from configs._common import finish
from configs._melis import tuned_lstm
from configs.wikitext2._text import TRAIN_TOKENS, wikitext2


def get_config(argument=""):
    return finish(tuned_lstm(wikitext2("lstm", batch_size=64, seq_len=35), TRAIN_TOKENS, num_layers=2, epochs=150), argument)
