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
    def logits(self, hidden_BTD: Array, table_VD: Array) -> Array:
        """float32 [B, T, V]."""
        if self.tied:
            kernel_DV = table_VD.T
        else:
            kernel_DV = self.param("kernel", self.kernel_init, (hidden_BTD.shape[-1], self.vocab_size))
        bias_V = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
        hidden_BTD, kernel_DV = hidden_BTD.astype(self.dtype), kernel_DV.astype(self.dtype)
        return jnp.matmul(hidden_BTD, kernel_DV, preferred_element_type=jnp.float32) + bias_V

    def score(self, hidden_BTD: Array, targets_BT: Array, table_VD: Array) -> TokenScores:
        """Scores of the targets; the place where an output that never holds [B, T, V] would do its work."""
        logits_BTV = self.logits(hidden_BTD, table_VD)
        normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        return TokenScores(
            log_prob_BT=target_BT - normalizer_BT,
            correct_BT=logits_BTV.argmax(axis=-1) == targets_BT,
            mean_log_prob_BT=logits_BTV.mean(axis=-1) - normalizer_BT,
        )
