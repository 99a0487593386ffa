"""The medium variational LSTM of Gal & Ghahramani 2016, arXiv:1512.05287, 20M parameters, gates sharing masks. Published: valid
81.8, test 79.7, and test 79.0 where probabilities are averaged over masks of dropout.

python -m launch.train --config=configs/ptb/gal_medium.py --config.data.path=/path/to/ptb --workdir=runs/gal_medium

Not yet run. The authors' code has no rates for this size; 0.2 and 0.35 were chosen between none and those of the large one.
"""

from configs._common import finish
from configs.ptb._gal import gal


def get_config(argument=""):
    recipe = dict(init_scale=0.05, clip=5, epochs=39, full_epochs=6, decay=1 / 1.2)
    return finish(gal(650, word_and_state_rate=0.2, input_and_output_rate=0.35, **recipe), argument)
