"""The tuned LSTM of Melis et al. 2018, arXiv:1707.05589, on enwik8: 46M parameters in four layers. Published: test 1.30 bits per
byte.

python -m launch.train --config=configs/enwik8/melis.py --config.data.path=/path/to/enwik8 --workdir=runs/enwik8_melis

Not yet run; a GPU's work: 200,000 steps, 14 epochs. Widths, learning rate and dropout are those that the authors' code lists as
tuned; it looks at valid every 400 steps, at a part of it.
"""

from configs._common import finish
from configs._melis import tuned_lstm
from configs.enwik8._text import TRAIN_BYTES, enwik8


def get_config(argument=""):
    config = enwik8("lstm", batch_size=128, seq_len=50)
    model, optimizer, training = config.model, config.optimizer, config.training
    model.layer_dims, model.tie_embeddings = (1192,) * 4, False
    tuned_lstm(config, TRAIN_BYTES, epochs=14, learning_rate=0.002183, rates=(0.03355, 0.01223, 0.06230, 0.27957))
    optimizer.b2, optimizer.weight_decay = 0.99, 0.0
    training.num_steps, training.evaluate_every_steps = 200_000, 2000
    optimizer.plateau_patience, training.early_stopping = 2, 3  # 13 and 15 of its looks
    return finish(config, argument)
