"""LSTM over the characters of the Penn Treebank: 2 x 512, bits per character.

python -m launch.train --config=configs/ptb/char_lstm.py --config.data.path=/path/to/ptb --workdir=runs/ptb_char_lstm

Bits per character: valid 1.483, test 1.441 at the last of 3,188 steps, best on valid, after 41 min 03 s, with some other work
beside it: two cores of an Intel Xeon, 2026-11-28, Python 3.11, JAX 0.10.2, seed 0. No setting was tuned. The text is that of the
words: <unk> and N are spelt out, and a line ends with a newline.
"""

from configs._common import finish, steps_of
from configs.ptb._text import penn_treebank

TRAIN_CHARACTERS = 5_101_618


def get_config(argument=""):
    config = penn_treebank("lstm", batch_size=64, seq_len=100)
    config.data.tokenizer = "char"
    config.model.num_layers, config.model.hidden_dim, config.model.embed_dim, config.model.tie_embeddings = 2, 512, 128, False
    config.model.variational_dropout, config.model.dropout_rate, config.model.weight_drop_rate = True, 0.1, 0.1
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.weight_decay = "adamw", 0.003, 0.01
    config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.final_fraction = "cosine", 100, 0.01
    epoch = steps_of(config, TRAIN_CHARACTERS)
    config.training.num_steps, config.training.evaluate_every_steps = 4 * epoch, epoch
    config.training.log_every_steps = 100
    return finish(config, argument)
