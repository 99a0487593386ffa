"""The small LSTM of the Penn Treebank: four million parameters, the recipe of configs/_small.py.

python -m launch.train --config=configs/ptb/small/lstm.py --config.data.path=/path/to/ptb --workdir=runs/ptb_small_lstm

Perplexity valid 88.81, test 84.61. 3,546 s on two cores of an Intel Xeon with some work beside it (2026-11-27, Python 3.11,
JAX 0.10.2, seed 0). On two of an AMD EPYC it was 89.33 and 84.89 after 2,718 s (2026-11-26).

With dynamic evaluation, every 5 tokens (2026-11-28; on valid a minute by SGD and two and a half by RMS, which once takes four for
the gradients of train):
--dynamic=sgd --dynamic_learning_rate=0.3 --dynamic_decay=0.001 has 82.23 and 78.68; on valid 0.1 has 84.99, 1.0 has 83.87, and
0.3 with decay 0.01 has 83.34. --dynamic=rms --dynamic_learning_rate=0.0005 --dynamic_decay=0.002 --dynamic_epsilon=0.0002 has
76.23 and 73.51; of further learning rates, decays and epsilons 0.0005, 0.001, 0.0002 have 76.33 on valid; 0.0005, 0.005, 0.0002
77.19; 0.001, 0.005, 0.0005 77.72; 0.001, 0.002, 0.0002 79.83; 0.0002, 0.002, 0.0002 80.14; 0.0005, 0.005, 0.0005 80.56; 0.002,
0.02, 0.001 81.29; and the defaults, which Krause et al. (2018) chose for AWD-LSTM, 81.31.

Of three trials of two epochs this had the lowest perplexity on valid, 166.32; SGD at 30 with 20 rows of 70 tokens had 235.72,
AdamW at 0.003 on the same 64 rows of 35 had 201.14.
"""

from configs._common import finish
from configs._small import small
from configs.ptb._text import TRAIN_TOKENS, penn_treebank


def get_config(argument=""):
    return finish(small(penn_treebank("lstm"), 4_000_000, TRAIN_TOKENS, epochs=25), argument)
