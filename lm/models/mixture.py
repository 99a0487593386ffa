"""A mixture of softmaxes in place of one: an output whose logarithm has a higher rank than its hidden states."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.models.layers import Dropout, Initializer
from lm.models.output import LossSums, OutputModule, TokenScores, loss_sums, plain_logits, score_by_log_probs, score_tokens
from lm.models.products import Dense

Array = jax.Array


class Read(NamedTuple):
    """log π, float32 [B, T, K], and the vector that each softmax multiplies with E, [B, T, K, E]."""

    log_prior_BTK: Array
    latent_BTKE: Array


def _by_tokens(read):
    return tuple(leaf.reshape(-1, *leaf.shape[2:]) for leaf in read)


class MixtureOutput(OutputModule):
    """hidden -> Σ_k π_k softmax(tanh(hidden W_k + b_k) E), over one matrix E with a bias (Yang et al. 2018, arXiv:1711.03953).

    Attributes:
      num_softmaxes: K.
      embed_dim: width of E, the embedding's table if `tied`.
      latent_init: initialiser of W and of the matrix that π comes from.
      dropout_rate: of what each softmax reads, after the tanh; `variational`: one mask for all steps of a segment.
    """

    num_softmaxes: int
    embed_dim: int
    kernel_init: Initializer
    latent_init: Initializer
    dropout_rate: float = 0.0
    variational: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        self.prior = Dense(self.num_softmaxes, use_bias=False, kernel_init=self.latent_init, dtype=self.dtype)
        self.latent = Dense(self.num_softmaxes * self.embed_dim, kernel_init=self.latent_init, dtype=self.dtype)
        self.dropout = Dropout(self.dropout_rate, 1 if self.variational else None)
        self.bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
        if not self.tied:
            self.kernel = self.param("kernel", self.kernel_init, (self.embed_dim, self.vocab_size))

    def _matrix(self, table_VD):
        return (table_VD if self.tied else self.kernel).astype(self.dtype)

    def read(self, hidden_BTD: Array, rows_B: Array | None = None, train: bool = False) -> Read:
        """What the softmaxes read, with dropout in training, keyed by `rows_B`."""
        hidden_BTD = hidden_BTD.astype(self.dtype)
        log_prior_BTK = jax.nn.log_softmax(self.prior(hidden_BTD).astype(jnp.float32))
        latent = self.dropout(jnp.tanh(self.latent(hidden_BTD)), rows_B, train)
        return Read(log_prior_BTK, latent.reshape(*log_prior_BTK.shape, self.embed_dim))

    def logits(self, read: Read, table_VD: Array) -> Array:
        """Log probabilities, float32 [B, T, V]."""
        return self._log_probs(*read, self._matrix(table_VD), 1.0)

    def _log_probs(self, log_prior, latent, matrix, temperature):
        logits = plain_logits(latent / temperature, matrix, self.bias / temperature, self.tied)
        return jax.nn.logsumexp(log_prior[..., None] + jax.nn.log_softmax(logits), axis=-2)

    def score(self, read: Read, targets_BT: Array, table_VD: Array, temperature: float = 1.0) -> TokenScores:
        """Scores of the targets; the temperature divides the logits of each softmax."""
        matrix = self._matrix(table_VD)

        def log_probs(log_prior_NK, latent_NKD):
            return self._log_probs(log_prior_NK, latent_NKD, matrix, temperature)

        return score_by_log_probs(log_probs, _by_tokens(read), targets_BT, self.vocab_size * (self.num_softmaxes + 1))

    def loss_sums(self, read: Read, targets_BT: Array, weights_BT: Array, table_VD: Array, label_smoothing: float) -> LossSums:
        """Summed losses of the targets, with the gradient of the objective; without label smoothing.

        The gradient of -log Σ_k π_k p_k is that of Σ_k r_k (-log π_k - log p_k), where r_k is the share that softmax k has in
        the target's probability: a loss over N K tokens, each with its share as weight.
        """
        assert not label_smoothing, "lm.config refuses it"
        matrix, num_softmaxes = self._matrix(table_VD), self.num_softmaxes
        log_prior_NK, latent_NKD = _by_tokens(read)
        latent_MD = latent_NKD.reshape(-1, self.embed_dim)
        targets_M, weights_N = jnp.repeat(targets_BT.reshape(-1), num_softmaxes), weights_BT.reshape(-1)
        scores = score_tokens(*jax.lax.stop_gradient((latent_MD, matrix, self.bias)), targets_M, self.tied)
        joint_NK = jax.lax.stop_gradient(log_prior_NK) + scores.log_prob_BT.reshape(-1, num_softmaxes)
        total_N = jax.nn.logsumexp(joint_NK, axis=-1)
        weights_NK = jnp.exp(joint_NK - total_N[:, None]) * weights_N[:, None]
        over_softmaxes = loss_sums(latent_MD, matrix, self.bias, targets_M, weights_NK.reshape(-1), self.tied, 0.0)
        bound = over_softmaxes.objective - jnp.sum(weights_NK * log_prior_NK)
        loss = -jnp.sum(total_N * weights_N)
        return LossSums(loss + bound - jax.lax.stop_gradient(bound), loss)
