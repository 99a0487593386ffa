"""The small LSTM of Zaremba et al. 2014, arXiv:1409.2329: no dropout, SGD, 13 epochs. Published: valid 120.7, test 114.5.

python -m launch.train --config=configs/ptb/zaremba_small.py --config.data.path=/path/to/ptb --workdir=runs/zaremba_small

The paper sums the loss over the 20 steps of a row and averages over rows: its learning rate of 1 and clip of 5 are 20 and
0.25 on the mean per token that is differentiated here. It reports the last epoch: launch.evaluate --step=latest.

Perplexity on test at the last epoch: 114.50, 114.24 and 114.14 with seeds 0, 1 and 2; of the checkpoint that is best on valid:
115.10, 114.24 and 113.66. Seed 0 trained for 1,318 s on two CPU cores, the others side by side on one core each (2,489 and
2,468 s; 2026-11-25, Intel Xeon, Python 3.11, JAX 0.10.2). On two cores of an AMD EPYC seed 0 took 906 s: 113.46 at the last
epoch, 114.41 at the best (2026-11-26).
"""

from configs._common import finish
from configs.ptb._zaremba import zaremba


def get_config(argument=""):
    return finish(zaremba(200, init_scale=0.1, clip=5, epochs=13, full_epochs=4, decay=0.5, seq_len=20), argument)
