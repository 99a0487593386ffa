"""Transformer-XL (Dai et al. 2019, arXiv:1901.02860) on large corpora: the recipe of its authors' scripts."""

from lm.config import Config


def transformer_xl(config: Config, rates: tuple[float, float], learning_rate: float, **shape: int) -> Config:
    """Relative positions, a carry, ReLU, Adam under a cosine that ends at nothing.

    What differs: they normalise behind each residual branch, where here it is before; have no biases on queries, keys, values and
    their output; multiply embeddings by the root of their width; start from narrow normal distributions; drop from distances,
    inside the feed-forward and from the output too; carry what keys and values are made of, here these (see Attention); and at
    evaluation let a token see further back than in training, here as far all through. There a segment carries the one before it,
    so that its first token sees that one alone and its last two segments; here each sees two, of which all are carried. Where
    rare tokens have narrower vectors (`narrowing`), theirs is one projection of input and output, here two.

    Args:
      config: of a stream; changed and returned.
      rates: of dropout, on embedding and branches and of the attention weights.
      shape: num_layers, hidden_dim, num_heads, mlp_dim.
    """
    model, optimizer, training = config.model, config.optimizer, config.training
    for name in ("num_layers", "hidden_dim", "num_heads", "mlp_dim"):
        setattr(model, name, shape[name])
    model.positions, model.attention_window, model.activation = "relative", 2 * config.data.seq_len, "relu"
    model.dropout_rate, model.attention_dropout_rate = rates
    optimizer.name, optimizer.learning_rate, optimizer.clip_norm = "adam", learning_rate, 0.25
    optimizer.schedule, optimizer.final_fraction = "cosine", 0.0
    training.evaluate_every_steps, training.log_every_steps = 4000, 200
    return config
