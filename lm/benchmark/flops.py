"""Floating-point operations counted from a config: what the arithmetic of a model needs, however it is computed."""

import functools
import math

import jax

from lm.config import Config, layer_dims
from lm.models.build import build, initialise, parameter_role

TRAINING = 3  # times the operations of a forward pass: once forward, twice backward


def forward_flops_per_token(config: Config, vocab_size: int, carried_length: int | None = None) -> float:
    """Operations of a model's forward pass on one token: 2 N + 4 L D S. Training needs three times as many.

    N counts the entries of all matrices that every token is multiplied with, the output's V × D among them whether tied or
    free (of a mixture once for each softmax); the embedding's look-up, biases and norms are left out. Each entry costs a
    multiplication and an addition. The second term is a Transformer's attention, where D numbers of every layer meet S visible
    keys, once for the scores, once for the mixing and, with relative positions, once for their distances; S is the mean over
    positions: of min(t, window) for t = 1 … length in windows, and the window where a cache is carried through a stream.

    In an mLSTM it is what writes and reads its matrices, H × H / N numbers in each layer.

    Kaplan et al. 2020, arXiv:2001.08361, section 2.1 (2 N forward, 6 N in training, and the attention's share); Chowdhery et
    al. 2022, arXiv:2204.02311, appendix B (6 N + 12 L H Q T, which counts all T keys where a causal mask shows half of them).

    Args:
      config: resolved, its widths solved.
      vocab_size: V.
      carried_length: of texts that start empty and grow token by token; None: the batches of `config.data`.
    """
    model, length = config.model, carried_length or config.data.seq_len
    shapes = jax.eval_shape(functools.partial(initialise, build(config, vocab_size), 0))
    entries = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = tuple(part.key for part in path)
        over_vocabulary = ".".join(names).startswith("embedding.table" if model.tie_embeddings else "output.kernel")
        if "distance" in names:
            continue  # multiplied once for each distance, not for each token
        projects = names[0] == "embedding" and names[-1] == "kernel"
        if over_vocabulary or projects or parameter_role(names) in ("matrix", "output"):
            entries += math.prod(leaf.shape) * ((model.num_softmaxes or 1) if over_vocabulary else 1)
    attention = 0.0
    if model.architecture == "transformer":
        window = math.inf if model.attention_window is None else model.attention_window
        streams = carried_length is None and config.data.order == "stream"
        visible = window if streams else sum(min(t, window) for t in range(1, length + 1)) / length
        attention = (6.0 if model.positions == "relative" else 4.0) * model.num_layers * model.hidden_dim * visible
    if model.architecture == "mlstm":
        attention = sum(4.0 * width * width / model.num_heads for width in layer_dims(model))
    return 2.0 * entries + attention
