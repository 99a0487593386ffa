"""The tuned LSTM of Melis et al. 2018, arXiv:1707.05589, on WikiText-2: 24M parameters in two layers. Published: valid 69.1,
test 65.9.

python -m launch.train --config=configs/wikitext2/melis.py --config.data.path=/path/to/wikitext-2 --workdir=runs/wt2_melis

Not yet run; a GPU's work: 150 epochs. Widths, learning rate and dropout are those that the authors' code lists as tuned.
"""

from configs._common import finish
from configs._melis import tuned_lstm
from configs.wikitext2._text import TRAIN_TOKENS, wikitext2


def get_config(argument=""):
    config = wikitext2("lstm", batch_size=64, seq_len=35)
    config.model.layer_dims, config.model.embed_dim, config.model.project_output = (1227, 1227), 149, True
    rates = 0.48424, 0.09202, 0.45389, 0.39149
    return finish(tuned_lstm(config, TRAIN_TOKENS, epochs=150, learning_rate=0.00246041, rates=rates), argument)
