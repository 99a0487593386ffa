"""Transformer-XL on the Penn Treebank, 24M parameters (Dai et al. 2019, arXiv:1901.02860). Published: valid 56.72, test 54.52.

python -m launch.train --config=configs/ptb/transformer_xl.py --config.data.path=/path/to/ptb --workdir=runs/ptb_transformer_xl

Not yet run; a GPU's work: 300 epochs. The paper has variational dropout and averaged parameters on this corpus; the rest of
its settings it does not list, and its code leaves them out. What else differs is told in configs/_transformer_xl.py.
"""

from configs._common import finish
from configs.ptb._text import penn_treebank, steps_per_epoch


def get_config(argument=""):
    config = penn_treebank("transformer", batch_size=32, seq_len=70)
    model, optimizer, training = config.model, config.optimizer, config.training
    model.num_params, model.num_layers, model.num_heads = 24_000_000, 12, 10
    model.positions, model.attention_window, model.activation = "relative", 140, "relu"
    model.word_dropout_rate, model.embedding_dropout_rate, model.dropout_rate = 0.1, 0.4, 0.4
    model.attention_dropout_rate, model.variational_dropout = 0.2, True
    optimizer.name, optimizer.learning_rate, optimizer.clip_norm, optimizer.weight_decay = "adamw", 4e-4, 0.25, 0.01
    optimizer.schedule, optimizer.warmup_steps, optimizer.final_fraction = "cosine", 1000, 0.01
    training.averaging = "stall"
    epoch = steps_per_epoch(config)
    training.num_steps, training.evaluate_every_steps, training.log_every_steps = 300 * epoch, epoch, 200
    return finish(config, argument)
