"""AWD-LSTM on enwik8, 47M parameters (Merity et al. 2018, arXiv:1803.08240). Published: test 1.232 bits per byte.

python -m launch.train --config=configs/enwik8/awd_lstm.py --config.data.path=/path/to/enwik8 --workdir=runs/enwik8_awd_lstm

Not yet run; a GPU's work: 50 epochs. Settings are those of the authors' code. Its learning rate falls to a tenth after epochs 25
and 35, here where valid stalls; and its penalty on squares is part of the gradient, where decay stands beside Adam's step.
"""

from configs._common import finish, steps_of
from configs.enwik8._text import TRAIN_BYTES, enwik8


def get_config(argument=""):
    config = enwik8("lstm", batch_size=128, seq_len=200)
    model, optimizer, training = config.model, config.optimizer, config.training
    config.data.seq_len_std = 5.0
    model.layer_dims, model.variational_dropout = (1840, 1840, 400), True
    model.embedding_dropout_rate, model.dropout_rate, model.output_dropout_rate = 0.1, 0.1, 0.4
    model.weight_drop_rate = 0.2
    optimizer.name, optimizer.learning_rate, optimizer.clip_norm = "adam", 1e-3, 0.25
    optimizer.weight_decay, optimizer.decayed = 1.2e-6, "all"
    optimizer.schedule, optimizer.decay_factor = "plateau", 0.1
    epoch = steps_of(config, TRAIN_BYTES)
    training.num_steps, training.evaluate_every_steps, training.log_every_steps = 50 * epoch, epoch, 200
    return finish(config, argument)
