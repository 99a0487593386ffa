"""Transformer-XL on WikiText-103, 151M parameters (Dai et al. 2019, arXiv:1901.02860). Published: test 24.0.

python -m launch.train --config=configs/wikitext103/transformer_xl.py --config.data.path=/path/to/wikitext-103 --workdir=runs/xl

Not yet run; the work of several GPUs: 200,000 steps, 17 epochs. Shape and settings are those of the authors' script. It differs
in that it normalises behind each residual branch, where here it is before; has ReLU, here GELU; shares the biases of content and
distance among layers; has no biases on queries, keys, values and their output; multiplies embeddings by the root of their width;
starts from N(0, 0.02); drops from distances, inside the feed-forward and from the output too; carries what keys and values are
made of, here these (see Attention); and at evaluation lets a token see 640 positions back, here 300 all through. The embedding
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
