"""Transformer-XL on WikiText-103, 151M parameters (Dai et al. 2019, arXiv:1901.02860). Published: test 24.0.

python -m launch.train --config=configs/wikitext103/transformer_xl.py --config.data.path=/path/to/wikitext-103 --workdir=runs/xl

Not yet run; the work of several GPUs: 200,000 steps, 17 epochs. Shape and settings are those of the authors' script, which has a
ReLU where a GELU stands here, and at evaluation lets a token see 640 positions back; here it is 300 all through. The embedding
and the tied output are in four clusters of one width.
"""

from configs._common import finish
from lm.config import Config


def get_config(argument=""):
    config = Config()
    model, data, optimizer, training = config.model, config.data, config.optimizer, config.training
    model.architecture, model.hidden_dim, model.num_layers, model.num_heads, model.mlp_dim = "transformer", 410, 16, 10, 2100
    model.positions, model.attention_window = "relative", 300
    model.cutoffs, model.narrowing = (20_000, 40_000, 200_000), 1
    model.dropout_rate, model.attention_dropout_rate = 0.1, 0.0
    data.source, data.path, data.tokenizer = "text", "data/wikitext-103", "word"
    data.batch_size, data.seq_len = 60, 150
    optimizer.name, optimizer.learning_rate, optimizer.clip_norm = "adam", 2.5e-4, 0.25
    optimizer.schedule, optimizer.final_fraction = "cosine", 0.0
    training.num_steps, training.evaluate_every_steps, training.log_every_steps = 200_000, 4000, 200
    return finish(config, argument)
