"""The large LSTM of Zaremba et al. 2014, arXiv:1409.2329. Published: valid 82.2, test 78.4.

python -m launch.train --config=configs/ptb/zaremba_large.py --config.data.path=/path/to/ptb --workdir=runs/zaremba_large

Not yet run. As in zaremba_small.py, the paper's rate of 1 and clip of 10 are on the sum over 35 steps.
"""

from configs._common import finish
from configs.ptb._zaremba import zaremba


def get_config(argument=""):
    return finish(zaremba(1500, init_scale=0.04, dropout_rate=0.65, clip=10, epochs=55, full_epochs=14, decay=1 / 1.15), argument)
