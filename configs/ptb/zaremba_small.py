"""The small LSTM of Zaremba et al. 2014, arXiv:1409.2329: no dropout, SGD, 13 epochs. Published: valid 120.7, test 114.5.

python -m launch.train --config=configs/ptb/zaremba_small.py --config.data.path=/path/to/ptb --workdir=runs/zaremba_small

The paper sums the loss over the 20 steps of a row and averages over rows: its learning rate of 1 and clip of 5 are 20 and
0.25 on the mean per token that is differentiated here. It reports the last epoch: launch.evaluate --step=latest.

Perplexity on test at the last epoch: 114.50, 114.24 and 114.14 with seeds 0, 1 and 2; of the checkpoint that is best on valid:
115.10, 114.24 and 113.66. Seed 0 trained for 1,318 s on two CPU cores, the others side by side on one core each (2,489 and
2,468 s; 2026-11-25, Intel Xeon, Python 3.11, JAX 0.10.2).
"""

from configs._common import finish
from configs.ptb._text import penn_treebank, steps_per_epoch


def get_config(argument=""):
    config = penn_treebank("lstm", batch_size=20, seq_len=20)
    config.model.num_layers, config.model.hidden_dim = 2, 200
    config.model.tie_embeddings = False
    config.model.kernel_init = config.model.recurrent_init = config.model.embedding_init = "uniform"
    config.model.init_scale, config.model.forget_bias = 0.1, 0.0
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.clip_norm = "sgd", 20.0, 0.25
    config.optimizer.schedule, config.optimizer.decay_start_epoch, config.optimizer.decay_factor = "step", 4, 0.5
    epoch = steps_per_epoch(config)
    config.training.num_steps, config.training.evaluate_every_steps = 13 * epoch, epoch
    config.training.log_every_steps = 200
    return finish(config, argument)
