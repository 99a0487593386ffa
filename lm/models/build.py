"""Config -> model: the only place that chooses an architecture by name, solves widths from a budget and tells roles by path."""

import functools
import math

import jax
import jax.numpy as jnp

from lm.config import RECURRENT, Config, check_clusters, default_mlp_dim, layer_dims, replaced
from lm.errors import UserError
from lm.models.adaptive import AdaptiveEmbedding, AdaptiveOutput
from lm.models.language_model import LanguageModel
from lm.models.layers import Embedding, initializer
from lm.models.mixture import MixtureOutput
from lm.models.ngram import Ngram
from lm.models.output import OutputLayer
from lm.models.recurrent import RecurrentStack
from lm.models.transformer import TransformerStack


def build(config: Config, vocab_size: int) -> LanguageModel | Ngram:
    """The model of a resolved config whose widths are solved.

    Args:
      config: as `solve_widths` returns it.
      vocab_size: V, known once the tokenizer is.
    """
    model = config.model
    if model.architecture == "ngram":
        return Ngram(order=model.ngram_order, vocab_size=vocab_size)
    dtype = jnp.dtype(config.compute_dtype)
    embedding_init = initializer(model.embedding_init, model.init_scale)
    stack, embed_dim, multiplier = (_recurrent if model.architecture in RECURRENT else _transformer)(model, dtype)
    tied, latent_init = model.tie_embeddings, initializer(model.kernel_init, model.init_scale)
    table = vocab_size, embed_dim, embedding_init, model.word_dropout_rate, multiplier, dtype
    if model.cutoffs:
        clusters = model.cutoffs, model.narrowing
        output = AdaptiveOutput(vocab_size, tied, embed_dim, *clusters, embedding_init, latent_init, dtype)
        return LanguageModel(AdaptiveEmbedding(*table, *clusters, latent_init), stack, output)
    if (model.num_softmaxes or 1) > 1:  # a run of before there were mixtures has None
        dropout = model.softmax_dropout_rate or 0.0, bool(model.variational_dropout)
        output = MixtureOutput(vocab_size, tied, model.num_softmaxes, embed_dim, embedding_init, latent_init, *dropout, dtype)
    else:
        output = OutputLayer(vocab_size, tied, embedding_init, dtype)
    return LanguageModel(Embedding(*table), stack, output)


def _recurrent(model, dtype):
    widths = layer_dims(model)
    stack = RecurrentStack(
        name_of_cell=model.architecture,
        layer_dims=widths,
        skip_connections=bool(model.skip_connections),
        kernel_init=initializer(model.kernel_init, model.init_scale),
        recurrent_init=initializer(model.recurrent_init or model.kernel_init, model.init_scale),
        activation=model.activation,
        input_gate=model.input_gate,
        embedding_dropout_rate=model.embedding_dropout_rate,
        dropout_rate=model.dropout_rate,
        output_dropout_rate=model.output_dropout_rate,
        weight_drop_rate=model.weight_drop_rate or 0.0,
        state_dropout_rate=model.state_dropout_rate or 0.0,
        mogrifier_rounds=model.mogrifier_rounds or 0,
        mogrifier_rank=model.mogrifier_rank,
        variational=model.variational_dropout,
        projected_dim=model.embed_dim if model.project_output else None,
        num_heads=model.num_heads or 1,
        forget_bias=model.forget_bias or 0.0,
        dtype=dtype,
    )
    return stack, model.embed_dim or widths[-1], 1.0


def _transformer(model, dtype):
    init = initializer(model.kernel_init, model.init_scale)
    # Each block adds two branches to the residual stream; this keeps its variance at the start (Radford et al. 2019).
    branch = 1 / math.sqrt(2 * model.num_layers)
    stack = TransformerStack(
        num_layers=model.num_layers,
        model_dim=model.hidden_dim,
        num_heads=model.num_heads,
        mlp_dim=model.mlp_dim,
        activation=model.activation,
        norm=model.norm,
        positions=model.positions,
        kernel_init=init,
        out_init=lambda *args: init(*args) * branch,
        position_init=initializer(model.embedding_init, model.init_scale),
        max_positions=model.max_positions,
        attention_window=model.attention_window,
        embedding_dropout_rate=model.embedding_dropout_rate,
        dropout_rate=model.dropout_rate,
        attention_dropout_rate=model.attention_dropout_rate,
        variational=bool(model.variational_dropout),
        normed_queries=bool(model.qk_norm),
        scan_layers=model.scan_layers,
        remat=model.remat,
        dtype=dtype,
    )
    return stack, model.hidden_dim, math.sqrt(model.hidden_dim) if model.positions == "sinusoidal" else 1.0


def initialise(model: LanguageModel, seed: int):
    """Fresh float32 parameters, the same for the same seed."""
    return _initialised(model, jax.random.fold_in(jax.random.key(seed), 0))


@functools.partial(jax.jit, static_argnames=("model",))
def _initialised(model, key):
    """One program, of which nothing stays: operation by operation, each leaves one behind, some 130 MiB in all."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32), method="touch_all")["params"]


@functools.lru_cache(maxsize=256)
def count_params(config: Config, vocab_size: int) -> int:
    """Number of parameters, read off the model itself."""
    shapes = jax.eval_shape(functools.partial(initialise, build(config, vocab_size), 0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def solve_widths(config: Config, vocab_size: int) -> Config:
    """The config with `hidden_dim` (and a Transformer's `mlp_dim`) solved from `model.num_params`, where that is set.

    Recurrent: the width whose count comes nearest. Transformer: the largest width whose count with the usual `mlp_dim` is
    within the budget, in steps that give every head an even width; then `mlp_dim` takes up the rest.

    Raises:
      UserError: a budget too small for any width, or for that of a cluster of rare tokens.
    """
    model = config.model
    if model.architecture == "ngram" or model.num_params is None or model.hidden_dim is not None:
        return config
    budget = model.num_params
    step = {"transformer": 2 * (model.num_heads or 1), "mlstm": model.num_heads}.get(model.architecture, 1)

    def with_width(multiple):
        wide = replaced(config, "model", hidden_dim=multiple * step)
        return replaced(wide, "model", mlp_dim=default_mlp_dim(wide.model)) if model.architecture == "transformer" else wide

    def count(multiple):
        return count_params(with_width(multiple), vocab_size)

    if count(1) > budget:
        raise UserError(
            f"config.model.num_params is {budget}, but the narrowest {model.architecture} with num_layers={model.num_layers} and "
            f"a vocabulary of {vocab_size} has {count(1)} parameters; give more, or fewer layers"
        )
    high = 2
    while count(high) <= budget:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    if model.architecture != "transformer":
        solved = with_width(min(low, high, key=lambda width: abs(count(width) - budget)))
    else:
        solved = with_width(low)
        mlp_dim = solved.model.mlp_dim
        per_unit = count_params(replaced(solved, "model", mlp_dim=mlp_dim + 1), vocab_size) - count_params(solved, vocab_size)
        solved = replaced(solved, "model", mlp_dim=mlp_dim + round((budget - count_params(solved, vocab_size)) / per_unit))
    check_clusters(solved.model)
    return solved


def parameter_role(path: tuple[str, ...]) -> str:
    """What a parameter is, told by its path: "embedding", "output", "norm", "bias" or "matrix".

    Weight decay, freezing and other rules over parameters are rules over these.
    """
    scope, leaf = path[0], path[-1]
    if leaf.endswith("bias"):
        return "bias"
    if scope == "embedding" or leaf == "position_table":
        return "embedding"
    if scope == "output":
        return "output"
    if any(part.endswith("norm") for part in path):
        return "norm"
    return "matrix"
