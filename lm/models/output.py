"""From hidden states to logits, and from hidden states and targets to scores: a tied or a free matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.models.layers import Initializer

Array = jax.Array


class TokenScores(NamedTuple):
    """Per token, float32 [B, T]: log probability of the target in nats, whether it is the likeliest token (bool), and the
    mean log probability over the vocabulary (what label smoothing spreads the target over)."""

    log_prob_BT: Array
    correct_BT: Array
    mean_log_prob_BT: Array


@jax.custom_vjp
def score_tokens(hidden_ND: Array, kernel_DV: Array, bias_V: Array, targets_N: Array) -> TokenScores:
    """Scores of N targets, the leaves [N] each.

    The gradient is written down by hand: what softmax leaves behind, exp(logit - max) and its sum, is all it needs, so that
    the logits are made once and read once, and a target's place is found by comparison instead of a scatter.
    """
    return _score_tokens(hidden_ND, kernel_DV, bias_V, targets_N)[0]


def _score_tokens(hidden_ND, kernel_DV, bias_V, targets_N):
    logits_NV = _logits(hidden_ND, kernel_DV, bias_V)
    largest_N = logits_NV.max(axis=-1)
    exponentials_NV = jnp.exp(logits_NV - largest_N[:, None])
    total_N = exponentials_NV.sum(axis=-1)
    normalizer_N = largest_N + jnp.log(total_N)
    target_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    scores = TokenScores(
        log_prob_BT=target_N - normalizer_N,
        correct_BT=logits_NV.argmax(axis=-1) == targets_N,
        mean_log_prob_BT=logits_NV.mean(axis=-1) - normalizer_N,
    )
    return scores, (hidden_ND, kernel_DV, targets_N, exponentials_NV, total_N)


def _score_tokens_backward(saved, cotangents: TokenScores):
    hidden_ND, kernel_DV, targets_N, exponentials_NV, total_N = saved
    d_target_N, _, d_mean_N = cotangents
    vocab_size, dtype = kernel_DV.shape[-1], hidden_ND.dtype
    is_target_NV = jnp.arange(vocab_size) == targets_N[:, None]
    d_logits_NV = (
        jnp.where(is_target_NV, d_target_N[:, None], 0)
        + d_mean_N[:, None] / vocab_size
        - exponentials_NV * ((d_target_N + d_mean_N) / total_N)[:, None]
    )
    d_bias_V = d_logits_NV.sum(axis=0)
    d_logits_NV = d_logits_NV.astype(dtype)
    return d_logits_NV @ kernel_DV.T, hidden_ND.T @ d_logits_NV, d_bias_V, None


score_tokens.defvjp(_score_tokens, _score_tokens_backward)


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
        """Scores of the targets; the place where an output that never holds [B, T, V] would do its work."""
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).astype(self.dtype)
        scores = score_tokens(hidden_ND, *self._kernel_and_bias(hidden_ND.shape[-1], table_VD), targets_BT.reshape(-1))
        return jax.tree.map(lambda leaf_N: leaf_N.reshape(targets_BT.shape), scores)
