"""From hidden states to logits, and from hidden states and targets to scores and losses: a tied or a free matrix."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.models.layers import Initializer
from lm.partition import ROWS, VOCABULARY, count, locally

Array = jax.Array

_WIDE = 8192  # columns
_AT_ONCE_CPU, _AT_ONCE = 1 << 23, 1 << 25  # float32 numbers: 32 and 128 MiB
_NEVER = -1e30  # a bias whose token's probability is zero


class TokenScores(NamedTuple):
    """Per token, float32 [B, T]: log probability of the target in nats, whether it is the likeliest token (bool), and the
    mean log probability over the vocabulary (what label smoothing spreads the target over)."""

    log_prob_BT: Array
    correct_BT: Array
    mean_log_prob_BT: Array


class LossSums(NamedTuple):
    """Sums over tokens, float32, each token with its weight: what is differentiated, and the negative log likelihood (nats)."""

    objective: Array
    loss: Array


def logits_at_once(platform: str | None = None) -> int:
    """How many logits are made at a time, on what `jax.default_backend` or the caller names.

    Each part of the tokens reads the whole matrix and adds to its whole gradient. A CPU's arithmetic is slow enough not to
    notice; an accelerator needs more rows beside each reading.
    """
    return _AT_ONCE_CPU if (platform or jax.default_backend()) == "cpu" else _AT_ONCE


def score_tokens(hidden_ND: Array, matrix: Array, bias_V: Array, targets_N: Array, tied: bool) -> TokenScores:
    """Scores of N targets, the leaves [N] each; logits are made for some tokens at a time. The matrix is as in `loss_sums`."""
    vocab_size = len(bias_V)

    def score_all(part, hidden_ND, matrix, bias_V, columns_V, targets_N):
        def score(hidden_ND, targets_N):
            logits_NV = plain_logits(hidden_ND, matrix, bias_V, tied)
            _, _, largest_N, normalizer_N = _exponentials(part, logits_NV)
            here_N = jnp.where(logits_NV.max(axis=-1) == largest_N, columns_V[logits_NV.argmax(axis=-1)], vocab_size)
            return TokenScores(
                log_prob_BT=_at(part, logits_NV, columns_V, targets_N) - normalizer_N,
                correct_BT=part.min(here_N, VOCABULARY) == targets_N,  # of equals the first is the likeliest
                mean_log_prob_BT=_mean(part, logits_NV, columns_V, vocab_size) - normalizer_N,
            )

        num_tokens = len(targets_N)
        cut = parts((hidden_ND, targets_N), len(bias_V))
        if cut is None:
            return score(hidden_ND, targets_N)
        scores = jax.lax.map(lambda rows: score(*rows), cut)
        return jax.tree.map(lambda leaf: leaf.reshape(-1)[:num_tokens], scores)

    inputs = (ROWS,), *_matrix_names(tied), (ROWS,)
    score_here = locally(score_all, inputs, TokenScores((ROWS,), (ROWS,), (ROWS,)))
    return score_here(hidden_ND, *_padded(matrix, bias_V, tied), targets_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def loss_sums(
    hidden_ND: Array, matrix: Array, bias_V: Array, targets_N: Array, weights_N: Array, tied: bool, label_smoothing: float
) -> LossSums:
    """Summed losses of N targets, with the gradient of the objective alone.

    How every logit enters the objective is known before any gradient arrives, so the gradient is worked out going forward:
    logits are made for some tokens at a time, used for the loss and for the gradient, and dropped. Three matmuls, as without
    parts, and never [N, V] as a whole. As in Liger Kernel's fused linear cross entropy (Hsu et al. 2024, arXiv:2410.10989).

    Args:
      hidden_ND, matrix: in the dtype of the matmuls; the matrix is [V, D] if tied, else [D, V], so that neither it nor its
        gradient is ever turned.
      weights_N: a token of weight 0 counts nowhere.
      label_smoothing: the target's share that is spread evenly over the vocabulary.

    Returns:
      Sums in nats.
    """
    scores = score_tokens(hidden_ND, matrix, bias_V, targets_N, tied)
    loss = -jnp.sum(scores.log_prob_BT * weights_N)
    smooth = -jnp.sum(scores.mean_log_prob_BT * weights_N)
    return LossSums(_mixed(loss, smooth, label_smoothing), loss)


def _mixed(loss, smooth, label_smoothing):
    return (1 - label_smoothing) * loss + label_smoothing * smooth if label_smoothing else loss


def _loss_sums_forward(hidden_ND, matrix, bias_V, targets_N, weights_N, tied, label_smoothing):
    vocab_size = len(bias_V)

    def sum_all(part, hidden_ND, matrix, bias_V, columns_V, targets_N, weights_N):
        def add_rows(hidden_ND, targets_N, weights_N, d_matrix):
            logits_NV = plain_logits(hidden_ND, matrix, bias_V, tied)
            exponentials_NV, total_N, _, normalizer_N = _exponentials(part, logits_NV)
            loss = -jnp.sum((_at(part, logits_NV, columns_V, targets_N) - normalizer_N) * weights_N)
            smooth = 0.0
            if label_smoothing:
                smooth = -jnp.sum((_mean(part, logits_NV, columns_V, vocab_size) - normalizer_N) * weights_N)
            is_target_NV = columns_V == targets_N[:, None]
            d_logits_NV = exponentials_NV * (weights_N / total_N)[:, None]
            d_logits_NV -= jnp.where(is_target_NV, (1 - label_smoothing) * weights_N[:, None], 0)
            if label_smoothing:
                d_logits_NV -= label_smoothing / vocab_size * weights_N[:, None]
            d_bias_V = _column_sums(d_logits_NV)
            d_logits_NV = d_logits_NV.astype(hidden_ND.dtype)
            d_hidden_ND = part.sum(jnp.einsum("nv,vd->nd" if tied else "nv,dv->nd", d_logits_NV, matrix), VOCABULARY)
            d_matrix = _add_matrix_gradient(d_matrix, hidden_ND, d_logits_NV, tied)
            return LossSums(_mixed(loss, smooth, label_smoothing), loss), d_bias_V, d_hidden_ND, d_matrix

        num_tokens = len(targets_N)
        cut = parts((hidden_ND, targets_N, weights_N), len(bias_V))
        if cut is None:
            sums, d_bias_V, d_hidden_ND, d_matrix = add_rows(hidden_ND, targets_N, weights_N, None)
        else:

            def add(before, rows):
                sums, d_bias_V, d_matrix = before
                more, more_bias_V, d_hidden_ND, d_matrix = add_rows(*rows, d_matrix)
                return (jax.tree.map(jnp.add, sums, more), d_bias_V + more_bias_V, d_matrix), d_hidden_ND

            zero = jnp.zeros(())
            empty = (LossSums(zero, zero), jnp.zeros(bias_V.shape), jnp.zeros(matrix.shape))
            (sums, d_bias_V, d_matrix), d_hidden_PND = jax.lax.scan(add, empty, cut)
            d_hidden_ND = d_hidden_PND.reshape(-1, hidden_ND.shape[-1])[:num_tokens]
        sums, d_bias_V, d_matrix = part.sum((sums, d_bias_V, d_matrix), ROWS)
        return sums, d_hidden_ND, d_matrix.astype(matrix.dtype), d_bias_V

    names = _matrix_names(tied)
    sum_here = locally(sum_all, ((ROWS,), *names, (ROWS,), (ROWS,)), (LossSums((), ()), (ROWS,), *names[:2]))
    sums, d_hidden_ND, d_matrix, d_bias_V = sum_here(hidden_ND, *_padded(matrix, bias_V, tied), targets_N, weights_N)
    return sums, (d_hidden_ND, jax.lax.slice_in_dim(d_matrix, 0, vocab_size, axis=0 if tied else 1), d_bias_V[:vocab_size])


def _column_sums(x_NV):
    """Of float32. A CPU makes those of a wide matrix up to fifty times as fast by a product as by XLA's own sum."""
    if jax.default_backend() == "cpu" and x_NV.shape[-1] > _WIDE:
        return jnp.einsum("n,nv->v", jnp.ones(x_NV.shape[0]), x_NV)
    return x_NV.sum(axis=0)


def _add_matrix_gradient(d_matrix, hidden_ND, d_logits_NV, tied):
    """Adds a part's gradient to that of the parts before it (None: it is the first), float32, by blocks of the vocabulary.

    A product as big as the matrix would stand beside the sum; of a block it does not matter.
    """
    axis, vocab_size = 0 if tied else 1, d_logits_NV.shape[-1]

    def product(start, width):
        names = "nv,nd->vd" if tied else "nv,nd->dv"
        block_NV = jax.lax.dynamic_slice_in_dim(d_logits_NV, start, width, axis=1)
        return jnp.einsum(names, block_NV, hidden_ND, preferred_element_type=jnp.float32)

    def add(start, width, d_matrix):
        before = jax.lax.dynamic_slice_in_dim(d_matrix, start, width, axis)
        return jax.lax.dynamic_update_slice_in_dim(d_matrix, before + product(start, width), start, axis)

    if d_matrix is None:
        return product(0, vocab_size)
    num_blocks = math.ceil(d_matrix.size / logits_at_once())
    width, rest = divmod(vocab_size, num_blocks)
    d_matrix = jax.lax.fori_loop(0, num_blocks, lambda i, d_matrix: add(i * width, width, d_matrix), d_matrix)
    return add(vocab_size - rest, rest, d_matrix) if rest else d_matrix


def _loss_sums_backward(tied, label_smoothing, gradient, cotangents: LossSums):
    del tied, label_smoothing
    scaled = jax.tree.map(lambda g: (g * cotangents.objective).astype(g.dtype), gradient)
    return *scaled, None, None


loss_sums.defvjp(_loss_sums_forward, _loss_sums_backward)


def score_by_log_probs(
    log_probs: Callable[..., Array], inputs: tuple[Array, ...], targets_BT: Array, numbers_per_token: int
) -> TokenScores:
    """Scores of targets by a whole distribution, which is made for some tokens at a time.

    Args:
      log_probs: inputs of some tokens -> their log probabilities [n, V].
      inputs: of all tokens, [B * T, ...] each.
      numbers_per_token: how many numbers `log_probs` holds at once for each token.
    """

    def score(targets_N, *inputs):
        log_probs_NV = log_probs(*inputs)
        log_prob_N = jnp.take_along_axis(log_probs_NV, targets_N[:, None], axis=-1)[:, 0]
        return TokenScores(log_prob_N, log_probs_NV.argmax(axis=-1) == targets_N, log_probs_NV.mean(axis=-1))

    rows = targets_BT.reshape(-1), *inputs
    cut = parts(rows, numbers_per_token)
    scores = score(*rows) if cut is None else jax.lax.map(lambda some: score(*some), cut)
    return jax.tree.map(lambda leaf: leaf.reshape(-1)[: targets_BT.size].reshape(targets_BT.shape), scores)


def parts(rows, numbers_per_token: int):
    """Arrays [N, ...] as [parts, N / parts, ...], filled up with zeros, so that a part's logits stay small; None: one part."""
    num_tokens = len(rows[0])
    num_parts = math.ceil(num_tokens * numbers_per_token / logits_at_once())
    if num_parts <= 1:
        return None
    length = math.ceil(num_tokens / num_parts)
    num_parts = math.ceil(num_tokens / length)
    padding = num_parts * length - num_tokens

    def cut(x):
        return jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1))).reshape(num_parts, length, *x.shape[1:])

    return jax.tree.map(cut, rows)


def plain_logits(hidden: Array, matrix: Array, bias_V: Array, tied: bool) -> Array:
    """float32 [..., V] of hidden states [..., D]; the matrix is as in `loss_sums`."""
    names = "...d,vd->...v" if tied else "...d,dv->...v"
    return jnp.einsum(names, hidden, matrix, preferred_element_type=jnp.float32) + bias_V


def _matrix_names(tied):
    """How `_padded`'s arrays may be split."""
    return ((VOCABULARY,) if tied else (None, VOCABULARY)), (VOCABULARY,), (VOCABULARY,)


def _padded(matrix, bias_V, tied):
    """Matrix and bias, with entries that no token has until they split evenly; and the token of each."""
    padding = -len(bias_V) % count(VOCABULARY)
    if padding:
        matrix = jnp.pad(matrix, ((0, padding), (0, 0)) if tied else ((0, 0), (0, padding)))
        bias_V = jnp.pad(bias_V, (0, padding), constant_values=_NEVER)
    return matrix, bias_V, jnp.arange(len(bias_V))


def _exponentials(part, logits_NV):
    """exp(logit - largest), its sum over the vocabulary, the largest, and the logarithm of the sum of exp(logit)."""
    largest_N = part.max(logits_NV.max(axis=-1), VOCABULARY)
    exponentials_NV = jnp.exp(logits_NV - largest_N[:, None])
    total_N = part.sum(exponentials_NV.sum(axis=-1), VOCABULARY)
    return exponentials_NV, total_N, largest_N, largest_N + jnp.log(total_N)


def _at(part, logits_NV, columns_V, targets_N):
    """The logit of each target, from the part that has it."""
    index_N = targets_N - columns_V[0]
    has_N = (index_N >= 0) & (index_N < len(columns_V))
    found_N = jnp.take_along_axis(logits_NV, jnp.where(has_N, index_N, 0)[:, None], axis=-1)[:, 0]
    return part.sum(jnp.where(has_N, found_N, 0), VOCABULARY)


def _mean(part, logits_NV, columns_V, vocab_size):
    if count(VOCABULARY) * len(columns_V) > vocab_size:  # padded
        logits_NV = jnp.where(columns_V < vocab_size, logits_NV, 0)
    return part.sum(logits_NV.sum(axis=-1), VOCABULARY) / vocab_size


class OutputModule(nn.Module):
    """hidden -> probabilities over the vocabulary: what `read` returns is what `logits`, `score` and `loss_sums` take.

    Attributes:
      tied: use the embedding's table (Press & Wolf 2017, arXiv:1608.05859) instead of a matrix of its own.
    """

    vocab_size: int
    tied: bool

    def read(self, hidden_BTD: Array, rows_B: Array | None = None, train: bool = False) -> Any:
        """What the softmax reads of hidden states [B, T, D]: all of them as they are, unless an output says otherwise.

        Args:
          rows_B, train: for an output with dropout; as in a call of the model.
        """
        del rows_B, train
        return hidden_BTD


class OutputLayer(OutputModule):
    """One softmax, by a matrix with a bias."""

    kernel_init: Initializer
    dtype: Any = jnp.float32

    @nn.compact
    def _matrix_and_bias(self, hidden_dim, table_VD):
        matrix = table_VD if self.tied else self.param("kernel", self.kernel_init, (hidden_dim, self.vocab_size))
        return matrix.astype(self.dtype), self.param("bias", nn.initializers.zeros, (self.vocab_size,))

    def logits(self, hidden_BTD: Array, table_VD: Array) -> Array:
        """float32 [B, T, V]."""
        matrix, bias_V = self._matrix_and_bias(hidden_BTD.shape[-1], table_VD)
        return plain_logits(hidden_BTD.astype(self.dtype), matrix, bias_V, self.tied)

    def score(self, hidden_BTD: Array, targets_BT: Array, table_VD: Array, temperature: float = 1.0) -> TokenScores:
        """Scores of the targets, without ever holding [B, T, V] where that is big; the temperature divides the logits."""
        hidden_ND, matrix, bias_V = self._flat(hidden_BTD, table_VD)
        scores = score_tokens(hidden_ND / temperature, matrix, bias_V / temperature, targets_BT.reshape(-1), self.tied)
        return jax.tree.map(lambda leaf_N: leaf_N.reshape(targets_BT.shape), scores)

    def loss_sums(
        self, hidden_BTD: Array, targets_BT: Array, weights_BT: Array, table_VD: Array, label_smoothing: float
    ) -> LossSums:
        """Summed losses of the targets, for training; see `loss_sums`."""
        flat = self._flat(hidden_BTD, table_VD)
        return loss_sums(*flat, targets_BT.reshape(-1), weights_BT.reshape(-1), self.tied, label_smoothing)

    def _flat(self, hidden_BTD, table_VD):
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).astype(self.dtype)
        return hidden_ND, *self._matrix_and_bias(hidden_ND.shape[-1], table_VD)
