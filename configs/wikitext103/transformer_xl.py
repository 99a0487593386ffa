"""Transformer-XL on WikiText-103, 151M parameters (Dai et al. 2019, arXiv:1901.02860). Published: test 24.0.

python -m launch.train --config=configs/wikitext103/transformer_xl.py --config.data.path=/path/to/wikitext-103 --workdir=runs/xl

Not yet run; the work of several GPUs: 200,000 steps, 17 epochs. Shape and settings are those of the authors' script; what differs
is told in configs/_transformer_xl.py, and that theirs shares the biases of content and distance among layers. The embedding and
the tied output are in four clusters of one width.
"""

from configs._common import finish
from configs._transformer_xl import transformer_xl
from configs.wikitext103._text import wikitext103


def get_config(argument=""):
    config = wikitext103("transformer", batch_size=60, seq_len=150)
    shape = dict(num_layers=16, hidden_dim=410, num_heads=10, mlp_dim=2100)
    transformer_xl(config, rates=(0.1, 0.0), learning_rate=2.5e-4, **shape)
    config.model.narrowing = 1
    config.training.num_steps = 200_000
    return finish(config, argument)
