"""The small LSTM of the Penn Treebank: four million parameters, the recipe of configs/_small.py.

python -m launch.train --config=configs/ptb/small/lstm.py --config.data.path=/path/to/ptb --workdir=runs/ptb_small_lstm

Perplexity valid 88.81, test 84.61; with dynamic evaluation (sgd, 0.3, decay 0.001, every 5 tokens) 82.23 and 78.68. 3,546 s on
two cores of an Intel Xeon with some work beside it (2026-11-27, Python 3.11, JAX 0.10.2, seed 0). On two of an AMD EPYC it was
89.33 and 84.89, with dynamic evaluation 82.67 and 78.93, after 2,718 s (2026-11-26).

Of three trials of two epochs this had the lowest perplexity on valid, 166.32; SGD at 30 with 20 rows of 70 tokens had 235.72,
AdamW at 0.003 on the same 64 rows of 35 had 201.14.
"""

from configs._common import finish
from configs._small import small
from configs.ptb._text import TRAIN_TOKENS, penn_treebank


def get_config(argument=""):
    return finish(small(penn_treebank("lstm"), 4_000_000, TRAIN_TOKENS, epochs=25), argument)
