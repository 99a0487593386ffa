"""From hidden states to logits, and from hidden states and targets to scores and losses: a tied or a free matrix."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.models.layers import Initializer
from lm.models.products import by_parts, times
from lm.partition import ROWS, VOCABULARY, count, locally

Array = jax.Array

_WIDE = 8192  # columns
_AT_ONCE_CPU, _AT_ONCE = 1 << 23, 1 << 25  # float32 numbers: 32 and 128 MiB
_BLOCK, _NARROW = 1 << 22, 2048  # float32 numbers of some tokens' logits for some of the vocabulary; columns it has at least
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
    """Scores of N targets, the leaves [N] each. The matrix is as in `loss_sums`.

    Logits are made for some tokens at a time; on a CPU rather for some of the vocabulary, whose matrix is then read once.
    """
    vocab_size = len(bias_V)
    numbers_at_once, columns_at_once = logits_at_once(), vocab_size
    if jax.default_backend() == "cpu" and len(targets_N) * vocab_size > numbers_at_once:
        numbers_at_once, columns_at_once = _BLOCK, min(_NARROW, vocab_size)

    def score_all(part, hidden_ND, matrix, bias_V, columns_V, targets_N):
        def score(hidden_ND, targets_N):
            here = _summary(hidden_ND, matrix, bias_V, columns_V, targets_N, tied, vocab_size, numbers_at_once)
            largest_N = part.max(here.largest_N, VOCABULARY)
            total_N = part.sum(here.total_N * jnp.exp(here.largest_N - largest_N), VOCABULARY)
            likeliest_N = part.min(jnp.where(here.largest_N == largest_N, here.likeliest_N, vocab_size), VOCABULARY)
            normalizer_N = largest_N + jnp.log(total_N)
            return TokenScores(
                log_prob_BT=part.sum(here.at_target_N, VOCABULARY) - normalizer_N,
                correct_BT=likeliest_N == targets_N,
                mean_log_prob_BT=part.sum(here.sum_N, VOCABULARY) / vocab_size - normalizer_N,
            )

        num_tokens = len(targets_N)
        cut = parts((hidden_ND, targets_N), columns_at_once, numbers_at_once)
        if cut is None:
            return score(hidden_ND, targets_N)
        scores = jax.lax.map(lambda rows: score(*rows), cut)
        return jax.tree.map(lambda leaf: leaf.reshape(-1)[:num_tokens], scores)

    inputs = (ROWS,), *_matrix_names(tied), (ROWS,)
    score_here = locally(score_all, inputs, TokenScores((ROWS,), (ROWS,), (ROWS,)))
    return score_here(hidden_ND, *_padded(matrix, bias_V, tied), targets_N)


class _Summary(NamedTuple):
    """Of the logits of some columns: the largest, the sum of exp(logit - largest), the first token that has the largest, the
    target's logit (0 where it is elsewhere), and the sum."""

    largest_N: Array
    total_N: Array
    likeliest_N: Array
    at_target_N: Array
    sum_N: Array


def _summary(hidden_ND, matrix, bias_V, columns_V, targets_N, tied, vocab_size, numbers_at_once):
    num_tokens = len(targets_N)

    def add(start, width, before):
        def cut(x, axis=0):
            return jax.lax.dynamic_slice_in_dim(x, start, width, axis)

        columns_W, logits_NW = cut(columns_V), plain_logits(hidden_ND, cut(matrix, 0 if tied else 1), cut(bias_V), tied)
        largest_here_N = logits_NW.max(axis=-1)
        largest_N = jax.lax.stop_gradient(jnp.maximum(before.largest_N, largest_here_N))
        return _Summary(
            largest_N,
            before.total_N * jnp.exp(before.largest_N - largest_N) + jnp.exp(logits_NW - largest_N[:, None]).sum(axis=-1),
            jnp.where(largest_here_N > before.largest_N, columns_W[logits_NW.argmax(axis=-1)], before.likeliest_N),
            before.at_target_N + _at_target(logits_NW, columns_W, targets_N),
            before.sum_N + _real(logits_NW, columns_W, vocab_size).sum(axis=-1),
        )

    zero_N = jnp.zeros(num_tokens)
    empty = _Summary(zero_N - jnp.inf, zero_N, jnp.zeros(num_tokens, columns_V.dtype), zero_N, zero_N)
    width = max(1, numbers_at_once // num_tokens)
    return _by_blocks(add, empty, len(bias_V), math.ceil(len(bias_V) / width))


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
            largest_N = part.max(logits_NV.max(axis=-1), VOCABULARY)
            exponentials_NV = jnp.exp(logits_NV - largest_N[:, None])
            total_N = part.sum(exponentials_NV.sum(axis=-1), VOCABULARY)
            normalizer_N = largest_N + jnp.log(total_N)
            at_target_N = part.sum(_at_target(logits_NV, columns_V, targets_N), VOCABULARY)
            loss, smooth = -jnp.sum((at_target_N - normalizer_N) * weights_N), 0.0
            if label_smoothing:
                mean_N = part.sum(_real(logits_NV, columns_V, vocab_size).sum(axis=-1), VOCABULARY) / vocab_size
                smooth = -jnp.sum((mean_N - normalizer_N) * weights_N)
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
    return _by_blocks(add, d_matrix, vocab_size, math.ceil(d_matrix.size / logits_at_once()))


def _by_blocks(add, carry, num_columns, num_blocks):
    """The carry after carry = add(start, width, carry) for equal blocks of columns, and for what they leave over."""
    width, rest = divmod(num_columns, num_blocks)
    carry = jax.lax.fori_loop(0, num_blocks, lambda i, carry: add(i * width, width, carry), carry)
    return add(num_columns - rest, rest, carry) if rest else carry


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


def parts(rows, numbers_per_token: int, numbers_at_once: int | None = None):
    """Arrays [N, ...] as [parts, N / parts, ...], filled up with zeros, so that a part's logits stay small; None: one part."""
    num_tokens = len(rows[0])
    num_parts = math.ceil(num_tokens * numbers_per_token / (numbers_at_once or logits_at_once()))
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
    if tied:
        return jnp.einsum("...d,vd->...v", hidden, matrix, preferred_element_type=jnp.float32) + bias_V
    return times(hidden, matrix, preferred_element_type=jnp.float32) + bias_V


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


def _at_target(logits_NV, columns_V, targets_N):
    """The logit of each target; 0 where it is not among the columns."""
    index_N = targets_N - columns_V[0]
    has_N = (index_N >= 0) & (index_N < len(columns_V))
    found_N = jnp.take_along_axis(logits_NV, jnp.where(has_N, index_N, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(has_N, found_N, 0)


def _real(logits_NV, columns_V, vocab_size):
    """The logits, those of no token 0."""
    return logits_NV if count(VOCABULARY) == 1 else jnp.where(columns_V < vocab_size, logits_NV, 0)


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
        """float32 [B, T, V]; of a token that comes alone with a table that a loop over tokens turns once, for `times`."""
        matrix, bias_V = self._matrix_and_bias(hidden_BTD.shape[-1], table_VD)
        hidden_BTD, tied = hidden_BTD.astype(self.dtype), self.tied
        if tied and by_parts(hidden_BTD, matrix, contracted=1):
            matrix, tied = jax.lax.optimization_barrier(matrix.T), False  # of a bare transpose XLA does not think it worth while
        return plain_logits(hidden_BTD, matrix, bias_V, tied)

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
