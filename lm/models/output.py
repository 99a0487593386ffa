"""From hidden states to logits, and from hidden states and targets to scores and losses: a tied or a free matrix."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.models.layers import Initializer

Array = jax.Array

LOGITS_AT_ONCE = 1 << 25  # float32 numbers, 128 MiB


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


def score_tokens(hidden_ND: Array, kernel_DV: Array, bias_V: Array, targets_N: Array) -> TokenScores:
    """Scores of N targets, the leaves [N] each; logits are made for some tokens at a time."""

    def score(hidden_ND, targets_N):
        logits_NV = _logits(hidden_ND, kernel_DV, bias_V)
        normalizer_N = jax.nn.logsumexp(logits_NV, axis=-1)
        target_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
        return TokenScores(
            log_prob_BT=target_N - normalizer_N,
            correct_BT=logits_NV.argmax(axis=-1) == targets_N,
            mean_log_prob_BT=logits_NV.mean(axis=-1) - normalizer_N,
        )

    num_tokens = len(targets_N)
    parts = _parts((hidden_ND, targets_N), kernel_DV.shape[-1])
    if parts is None:
        return score(hidden_ND, targets_N)
    scores = jax.lax.map(lambda part: score(*part), parts)
    return jax.tree.map(lambda leaf: leaf.reshape(-1)[:num_tokens], scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def loss_sums(
    hidden_ND: Array, kernel_DV: Array, bias_V: Array, targets_N: Array, weights_N: Array, label_smoothing: float
) -> LossSums:
    """Summed losses of N targets, with the gradient of the objective alone.

    How every logit enters the objective is known before any gradient arrives, so the gradient is worked out going forward:
    logits are made for some tokens at a time, used for the loss and for the gradient, and dropped. Three matmuls, as without
    parts, and never [N, V] as a whole.

    Args:
      hidden_ND, kernel_DV: in the dtype of the matmuls.
      weights_N: a token of weight 0 counts nowhere.
      label_smoothing: the target's share that is spread evenly over the vocabulary.
    """
    scores = score_tokens(hidden_ND, kernel_DV, bias_V, targets_N)
    loss = -jnp.sum(scores.log_prob_BT * weights_N)
    smooth = -jnp.sum(scores.mean_log_prob_BT * weights_N)
    return LossSums(_mixed(loss, smooth, label_smoothing), loss)


def _mixed(loss, smooth, label_smoothing):
    return (1 - label_smoothing) * loss + label_smoothing * smooth if label_smoothing else loss


def _loss_sums_forward(hidden_ND, kernel_DV, bias_V, targets_N, weights_N, label_smoothing):
    vocab_size, num_tokens = kernel_DV.shape[-1], len(targets_N)

    def part(hidden_ND, targets_N, weights_N):
        logits_NV = _logits(hidden_ND, kernel_DV, bias_V)
        largest_N = logits_NV.max(axis=-1)
        exponentials_NV = jnp.exp(logits_NV - largest_N[:, None])
        total_N = exponentials_NV.sum(axis=-1)
        normalizer_N = largest_N + jnp.log(total_N)
        target_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
        loss = -jnp.sum((target_N - normalizer_N) * weights_N)
        smooth = -jnp.sum((logits_NV.mean(axis=-1) - normalizer_N) * weights_N) if label_smoothing else 0.0
        is_target_NV = jnp.arange(vocab_size) == targets_N[:, None]
        d_logits_NV = exponentials_NV * (weights_N / total_N)[:, None]
        d_logits_NV -= jnp.where(is_target_NV, (1 - label_smoothing) * weights_N[:, None], 0)
        if label_smoothing:
            d_logits_NV -= label_smoothing / vocab_size * weights_N[:, None]
        d_bias_V = d_logits_NV.sum(axis=0)
        d_logits_NV = d_logits_NV.astype(hidden_ND.dtype)
        d_kernel_DV = jnp.matmul(hidden_ND.T, d_logits_NV, preferred_element_type=jnp.float32)
        return (LossSums(_mixed(loss, smooth, label_smoothing), loss), d_kernel_DV, d_bias_V), d_logits_NV @ kernel_DV.T

    parts = _parts((hidden_ND, targets_N, weights_N), vocab_size)
    if parts is None:
        (sums, d_kernel_DV, d_bias_V), d_hidden_ND = part(hidden_ND, targets_N, weights_N)
    else:

        def add(sums, rows):
            more, d_hidden_ND = part(*rows)
            return jax.tree.map(jnp.add, sums, more), d_hidden_ND

        zero = jnp.zeros(())
        empty = (LossSums(zero, zero), jnp.zeros(kernel_DV.shape), jnp.zeros(bias_V.shape))
        (sums, d_kernel_DV, d_bias_V), d_hidden_PND = jax.lax.scan(add, empty, parts)
        d_hidden_ND = d_hidden_PND.reshape(-1, hidden_ND.shape[-1])[:num_tokens]
    return sums, (d_hidden_ND, d_kernel_DV, d_bias_V)


def _loss_sums_backward(label_smoothing, gradient, cotangents: LossSums):
    del label_smoothing
    d_hidden_ND, d_kernel_DV, d_bias_V = gradient
    scale = cotangents.objective
    dtype = d_hidden_ND.dtype
    return (d_hidden_ND * scale).astype(dtype), (d_kernel_DV * scale).astype(dtype), d_bias_V * scale, None, None


loss_sums.defvjp(_loss_sums_forward, _loss_sums_backward)


def _parts(rows, vocab_size):
    """Arrays [N, ...] as [parts, N / parts, ...], filled up with zeros, so that a part's logits stay small; None: one part."""
    num_tokens = len(rows[0])
    num_parts = math.ceil(num_tokens * vocab_size / LOGITS_AT_ONCE)
    if num_parts <= 1:
        return None
    length = math.ceil(num_tokens / num_parts)
    num_parts = math.ceil(num_tokens / length)
    padding = num_parts * length - num_tokens

    def cut(x):
        return jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1))).reshape(num_parts, length, *x.shape[1:])

    return jax.tree.map(cut, rows)


def _logits(hidden, kernel_DV, bias_V):
    return jnp.matmul(hidden, kernel_DV, preferred_element_type=jnp.float32) + bias_V


class OutputLayer(nn.Module):
    """hidden -> logits over the vocabulary, with a bias.

    Attributes:
      tied: use the embedding's table (Press & Wolf 2017, arXiv:1608.05859) instead of a matrix of its own.
    """

    vocab_size: int
    tied: bool
    kernel_init: Initializer
    dtype: Any = jnp.float32

    @nn.compact
    def _kernel_and_bias(self, hidden_dim, table_VD):
        if self.tied:
            kernel_DV = table_VD.T
        else:
            kernel_DV = self.param("kernel", self.kernel_init, (hidden_dim, self.vocab_size))
        return kernel_DV.astype(self.dtype), self.param("bias", nn.initializers.zeros, (self.vocab_size,))

    def logits(self, hidden_BTD: Array, table_VD: Array) -> Array:
        """float32 [B, T, V]."""
        return _logits(hidden_BTD.astype(self.dtype), *self._kernel_and_bias(hidden_BTD.shape[-1], table_VD))

    def score(self, hidden_BTD: Array, targets_BT: Array, table_VD: Array) -> TokenScores:
        """Scores of the targets, without ever holding [B, T, V] where that is big."""
        scores = score_tokens(*self._flat(hidden_BTD, table_VD), targets_BT.reshape(-1))
        return jax.tree.map(lambda leaf_N: leaf_N.reshape(targets_BT.shape), scores)

    def loss_sums(
        self, hidden_BTD: Array, targets_BT: Array, weights_BT: Array, table_VD: Array, label_smoothing: float
    ) -> LossSums:
        """Summed losses of the targets, for training; see `loss_sums`."""
        flat = self._flat(hidden_BTD, table_VD)
        return loss_sums(*flat, targets_BT.reshape(-1), weights_BT.reshape(-1), label_smoothing)

    def _flat(self, hidden_BTD, table_VD):
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).astype(self.dtype)
        return hidden_ND, *self._kernel_and_bias(hidden_ND.shape[-1], table_VD)
