"""The small LSTM of WikiText-2: eight million parameters, the recipe of configs/_small.py.

python -m launch.train --config=configs/wikitext2/small/lstm.py --config.data.path=/path/to/wikitext-2 \
    --workdir=runs/wt2_small_lstm

Not yet run.
"""

from configs._common import finish
from configs._small import small
from configs.wikitext2._text import TRAIN_TOKENS, wikitext2


def get_config(argument=""):
    return finish(small(wikitext2("lstm"), 8_000_000, TRAIN_TOKENS, epochs=3), argument)
