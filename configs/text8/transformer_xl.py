"""The large Transformer-XL on text8, 277M parameters (Dai et al. 2019, arXiv:1901.02860). Published: test 1.08 bits a character.

python -m launch.train --config=configs/text8/transformer_xl.py --config.data.path=/path/to/text8 --workdir=runs/text8_xl

The text is the one file text8 (http://mattmahoney.net/dc/textdata): 90 million characters are train, 5 million valid and as many
test. Not yet run; the work of many TPU cores for days: that of configs/enwik8/transformer_xl.py, with the same settings.
"""

from configs._common import finish
from configs.enwik8.transformer_xl import get_config as of_enwik8


def get_config(argument=""):
    config = of_enwik8()
    config.data.path, config.data.tokenizer = "data/text8/text8", "char"
    return finish(config, argument)
