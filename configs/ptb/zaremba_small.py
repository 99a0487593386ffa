"""The small LSTM of Zaremba et al. 2014, arXiv:1409.2329: no dropout, SGD, 13 epochs. Published: valid 120.7, test 114.5.

python -m launch.train --config=configs/ptb/zaremba_small.py --config.data.path=/path/to/ptb --workdir=runs/zaremba_small

The paper sums the loss over the 20 steps of a row and averages over rows: its learning rate of 1 and clip of 5 are 20 and
0.25 on the mean per token that is differentiated here. It reports the last epoch: launch.evaluate --step=latest.

Not yet run to its end; a step takes 57 ms on two CPU cores, so all of it half an hour (2026-11-24, Intel Xeon, JAX 0.10.2).
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
