"""Transformer-XL on lm1b, 0.8 billion parameters (Dai et al. 2019, arXiv:1901.02860). Published: test 21.8.

python -m launch.train --config=configs/lm1b/transformer_xl.py --config.data.path=/path/to/lm1b --workdir=runs/lm1b_xl

The folder has train.txt, the 99 training files of the benchmark (Chelba et al. 2014, arXiv:1312.3005) one after the other;
test.txt, its news.en.heldout-00000-of-00050; and valid.txt, another of those. Words seen less than three times are <unk>, which
leaves 793,471. Not yet run; the work of hundreds of TPU cores for days: 1.2 million steps. Shape and settings are those of the
authors' script; what differs is told in configs/_transformer_xl.py, and that theirs has two tokens between sentences, shuffles
these, and takes one file for valid and test.
"""

from configs._common import finish
from configs._transformer_xl import transformer_xl
from lm.config import Config


def get_config(argument=""):
    config = Config()
    config.model.architecture, config.model.cutoffs, config.model.narrowing = "transformer", (60_000, 100_000, 640_000), 4
    config.data.source, config.data.path, config.data.tokenizer, config.data.min_count = "text", "data/lm1b", "word", 3
    config.data.batch_size, config.data.seq_len = 512, 32
    shape = dict(num_layers=24, hidden_dim=1280, num_heads=16, mlp_dim=8192)
    transformer_xl(config, rates=(0.05, 0.05), learning_rate=1e-4, **shape)
    config.optimizer.warmup_steps, config.training.num_steps = 30_000, 1_200_000
    return finish(config, argument)
