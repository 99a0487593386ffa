"""AWD-LSTM on the Penn Treebank, 24M parameters (Merity et al. 2018, arXiv:1708.02182). Published: valid 60.7 and test
58.8, and after a fine-tuning stage 60.0 and 57.3.

python -m launch.train --config=configs/ptb/awd_lstm.py --config.data.path=/path/to/ptb --workdir=runs/awd_lstm

Not yet run; a GPU's work: 500 epochs. The fine-tuning stage is the same once more from the best parameters, averaged from the
start: --config.training.init_from=runs/awd_lstm --config.training.averaging=start --config.training.early_stopping=5, and
another --workdir. launch.results has both as rows, ptb/awd_lstm and ptb/awd_lstm_tuned.
"""

from configs._awd_lstm import awd_lstm
from configs._common import finish
from configs.ptb._text import TRAIN_TOKENS, penn_treebank


def get_config(argument=""):
    config = awd_lstm(penn_treebank("lstm", batch_size=20, seq_len=70), TRAIN_TOKENS, epochs=500)
    config.model.embedding_dropout_rate, config.model.dropout_rate = 0.4, 0.25
    return finish(config, argument)
