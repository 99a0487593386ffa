"""The large variational LSTM of Gal & Ghahramani 2016, arXiv:1512.05287, 66M parameters, gates sharing masks. Published: valid
77.3, test 75.0, and test 74.1 where probabilities are averaged over masks of dropout.

python -m launch.train --config=configs/ptb/gal_large.py --config.data.path=/path/to/ptb --workdir=runs/gal_large

Not yet run. The settings are those of the authors' code, which reports the last epoch and leaves out other words in each row,
here they are the same in all. The mean over masks: launch.evaluate --dropout_samples=100; the paper's is over a thousand, in
which words stay.
"""

from configs._common import finish
from configs.ptb._gal import gal


def get_config(argument=""):
    recipe = dict(init_scale=0.04, clip=10, epochs=55, full_epochs=11, decay=1 / 1.15)
    return finish(gal(1500, word_and_state_rate=0.3, input_and_output_rate=0.5, **recipe), argument)
