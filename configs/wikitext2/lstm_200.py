"""The LSTM of PyTorch's word_language_model example on WikiText-2: 2 × 200, SGD at 20, divided by 4 when valid stalls.

python -m launch.train --config=configs/wikitext2/lstm_200.py --config.data.path=/path/to/wikitext-2 --workdir=runs/wt2_lstm_200

Perplexity valid 170.62, test 157.87 after three epochs of the example's 40, 1,904 s on two cores of an Intel Xeon with some work
beside it (2026-11-28, Python 3.11, JAX 0.10.2, seed 0). All matrices begin within ±0.1; in the example those of the LSTM, and its
biases, begin within ±0.07. The same in PyTorch (2.13.0, the same day and machine, nothing beside it) has test 163.58 after
2,299 s, three looks at valid included:

python -m launch.word_language_model --data_path=/path/to/wikitext-2 --epochs=3
"""

from configs._common import finish
from configs._word_language_model import word_language_model
from configs.wikitext2._text import TRAIN_TOKENS, wikitext2


def get_config(argument=""):
    config = word_language_model(wikitext2("lstm"), TRAIN_TOKENS, width=200, dropout_rate=0.2, epochs=3)
    config.model.tie_embeddings = False
    config.model.kernel_init = config.model.recurrent_init = "uniform"
    return finish(config, argument)
