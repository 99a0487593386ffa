"""The large Transformer-XL on enwik8, 277M parameters (Dai et al. 2019, arXiv:1901.02860). Published: test 0.99 bits per byte.

python -m launch.train --config=configs/enwik8/transformer_xl.py --config.data.path=/path/to/enwik8 --workdir=runs/enwik8_xl

Not yet run; the work of many TPU cores for days: 400,000 steps, 218 epochs. Shape and settings are those of the authors' script;
what differs is told in configs/_transformer_xl.py.
"""

from configs._common import finish
from configs._transformer_xl import transformer_xl
from configs.enwik8._text import enwik8


def get_config(argument=""):
    config = enwik8("transformer", batch_size=64, seq_len=768)
    shape = dict(num_layers=24, hidden_dim=1024, num_heads=8, mlp_dim=3072)
    transformer_xl(config, rates=(0.15, 0.15), learning_rate=2.5e-4, **shape)
    config.optimizer.warmup_steps, config.training.num_steps = 4000, 400_000
    return finish(config, argument)
