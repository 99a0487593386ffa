"""AWD-LSTM with a mixture of 15 softmaxes on WikiText-2, 35M parameters (Yang et al. 2018, arXiv:1711.03953). Published: valid
66.01 and test 63.33, and after a fine-tuning stage 63.88 and 61.45.

python -m launch.train --config=configs/wikitext2/awd_lstm_mos.py --config.data.path=/path/to/wikitext-2 --workdir=runs/wt2_mos

Not yet run; a GPU's work: 1,000 epochs. The fine-tuning stage is that of configs/ptb/awd_lstm.py, with a learning rate of 20.
"""

from configs._awd_lstm import awd_lstm_mos
from configs._common import finish
from configs.wikitext2._text import TRAIN_TOKENS, wikitext2


def get_config(argument=""):
    config = awd_lstm_mos(wikitext2("lstm", batch_size=15), TRAIN_TOKENS, learning_rate=15.0)
    config.model.layer_dims, config.model.embed_dim = (1150, 1150, 650), 300
    config.model.embedding_dropout_rate, config.model.dropout_rate = 0.55, 0.2
    return finish(config, argument)
