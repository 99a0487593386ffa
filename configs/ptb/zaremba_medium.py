"""The medium LSTM of Zaremba et al. 2014, arXiv:1409.2329: dropout of a half. Published: valid 86.2, test 82.7.

python -m launch.train --config=configs/ptb/zaremba_medium.py --config.data.path=/path/to/ptb --workdir=runs/zaremba_medium

Not yet run. As in zaremba_small.py, the paper's rate of 1 and clip of 5 are on the sum over 35 steps.
"""

from configs._common import finish
from configs.ptb._zaremba import zaremba


def get_config(argument=""):
    return finish(zaremba(650, init_scale=0.05, dropout_rate=0.5, clip=5, epochs=39, full_epochs=6, decay=1 / 1.2), argument)
