"""AWD-LSTM with a mixture of 15 softmaxes, 22M parameters (Yang et al. 2018, arXiv:1711.03953). Published: valid
58.08 and test 55.97, and after a fine-tuning stage 56.54 and 54.44.

python -m launch.train --config=configs/ptb/awd_lstm_mos.py --config.data.path=/path/to/ptb --workdir=runs/awd_lstm_mos

Not yet run; a GPU's work: 1,000 epochs. The fine-tuning stage is that of configs/ptb/awd_lstm.py, with a learning rate of 25.
"""

from configs._awd_lstm import awd_lstm_mos
from configs._common import finish
from configs.ptb._text import TRAIN_TOKENS, penn_treebank


def get_config(argument=""):
    config = awd_lstm_mos(penn_treebank("lstm", batch_size=12), TRAIN_TOKENS, learning_rate=20.0)
    config.model.layer_dims, config.model.embed_dim = (960, 960, 620), 280
    config.model.embedding_dropout_rate, config.model.dropout_rate = 0.4, 0.225
    return finish(config, argument)
