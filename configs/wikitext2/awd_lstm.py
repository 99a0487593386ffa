"""AWD-LSTM on WikiText-2, 33M parameters (Merity et al. 2018, arXiv:1708.02182). Published: valid 69.1 and test 66.0,
and after a fine-tuning stage 68.6 and 65.8.

python -m launch.train --config=configs/wikitext2/awd_lstm.py --config.data.path=/path/to/wikitext-2 --workdir=runs/wt2_awd_lstm

Not yet run; a GPU's work: 750 epochs. The fine-tuning stage is that of configs/ptb/awd_lstm.py.
"""

from configs._awd_lstm import awd_lstm
from configs._common import finish
from configs.wikitext2._text import TRAIN_TOKENS, wikitext2


def get_config(argument=""):
    config = awd_lstm(wikitext2("lstm", batch_size=80, seq_len=70), TRAIN_TOKENS, epochs=750)
    config.model.embedding_dropout_rate, config.model.dropout_rate = 0.65, 0.2
    return finish(config, argument)
