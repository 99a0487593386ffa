"""The large Transformer-XL on WikiText-103, 283M parameters (Dai et al. 2019, arXiv:1901.02860). Published: test 18.3.

python -m launch.train --config=configs/wikitext103/transformer_xl_large.py --config.data.path=/path/to/wikitext-103 \
    --workdir=runs/xl_large

Not yet run; the work of many TPU cores for days: 4 million steps. Shape and settings are those of the authors' script; the
paper counts 257M parameters for it, of which 245M are the layers'. What differs is told in configs/_transformer_xl.py.
"""

from configs._common import finish
from configs._transformer_xl import transformer_xl
from configs.wikitext103._text import wikitext103


def get_config(argument=""):
    config = wikitext103("transformer", batch_size=128, seq_len=384)
    shape = dict(num_layers=18, hidden_dim=1024, num_heads=16, mlp_dim=4096)
    transformer_xl(config, rates=(0.2, 0.2), learning_rate=2.5e-4, **shape)
    config.model.narrowing = 4
    config.optimizer.warmup_steps, config.training.num_steps = 16_000, 4_000_000
    return finish(config, argument)
