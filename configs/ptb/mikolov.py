"""The recurrent network of Mikolov & Zweig 2012 (Context dependent recurrent neural network language model, SLT): 300 units, no
regularisation. Published: test 124.7.

python -m launch.train --config=configs/ptb/mikolov.py --config.data.path=/path/to/ptb --workdir=runs/ptb_mikolov

Not yet run. The paper's units are sigmoids, read from words by one matrix, and learn from one word at a time; here they are
tanh, words come by an embedding, and a step has 20 rows. The learning rate is halved whenever valid stalls; theirs, once it has
stalled, after every epoch.
"""

from configs._common import finish
from configs.ptb._text import penn_treebank, steps_per_epoch


def get_config(argument=""):
    config = penn_treebank("rnn", batch_size=20, seq_len=20)
    config.model.num_layers, config.model.hidden_dim, config.model.dropout_rate = 1, 300, 0.0
    config.model.tie_embeddings = False
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.clip_norm = "sgd", 10.0, 0.25
    config.optimizer.schedule, config.optimizer.decay_factor = "plateau", 0.5
    epoch = steps_per_epoch(config)
    config.training.num_steps, config.training.evaluate_every_steps, config.training.log_every_steps = 15 * epoch, epoch, 200
    return finish(config, argument)
