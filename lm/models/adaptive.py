"""Adaptive input embeddings and adaptive softmax: the vocabulary in clusters by frequency, the rarer the narrower."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.errors import UserError
from lm.models.layers import Embedding, Initializer, look_up
from lm.models.output import LossSums, OutputModule, TokenScores, loss_sums, plain_logits, score_by_log_probs
from lm.models.products import Dense

Array = jax.Array


def clusters(vocab_size: int, cutoffs: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """First token and the one after the last of each cluster.

    Raises:
      UserError: a cluster without a token.
    """
    if cutoffs[-1] >= vocab_size:
        raise UserError(
            f"config.model.cutoffs is {cutoffs}, but the vocabulary has {vocab_size} entries; all cutoffs must be below that"
        )
    return tuple(zip((0, *cutoffs), (*cutoffs, vocab_size), strict=True))


def widths(embed_dim: int, narrowing: int, number: int) -> list[int]:
    """Widths of the clusters' embeddings; at least 1, so that a search for a width may begin with the narrowest."""
    return [max(1, embed_dim // narrowing**i) for i in range(number)]


class AdaptiveEmbedding(Embedding):
    """Tables of embeddings, that of cluster i `narrowing`^i times narrower than the first, what is narrower than D with a
    projection to D (Baevski & Auli 2019, arXiv:1809.10853).

    Attributes:
      cutoffs: the first token of each cluster but the first; tokens are numbered by frequency.
    """

    cutoffs: tuple[int, ...] = ()
    narrowing: int = 4
    projection_init: Initializer = nn.initializers.xavier_uniform()

    def setup(self):
        self.clusters = clusters(self.vocab_size, self.cutoffs)
        sizes = zip(self.clusters, widths(self.embed_dim, self.narrowing, len(self.clusters)), strict=True)
        self.table = tuple(
            self.param(f"table_{i}", self.table_init, (end - start, width), jnp.float32)
            for i, ((start, end), width) in enumerate(sizes)
        )
        self.projections = [
            Dense(self.embed_dim, use_bias=False, kernel_init=self.projection_init, dtype=self.dtype, name=f"projection_{i}")
            for i in range(1, len(self.clusters))
            if self.narrowing > 1
        ]

    def __call__(self, tokens_BT: Array, train: bool = False) -> tuple[Array, tuple[Array, ...]]:
        """Embeddings [B, T, D], and the tables, from which a tied output reads on."""
        total_BTD, tables = 0.0, []
        for i, ((start, end), table) in enumerate(zip(self.clusters, self.table, strict=True)):
            rows_BTD, table = look_up(table, jnp.clip(tokens_BT - start, 0, end - start - 1))
            tables.append(table)
            rows_BTD = self.projections[i - 1](rows_BTD) if i and self.projections else rows_BTD.astype(self.dtype)
            there_BT = (tokens_BT >= start) & (tokens_BT < end)
            total_BTD += jnp.where(there_BT[..., None], rows_BTD, 0)
        return self._finished(total_BTD, tokens_BT, train), tuple(tables)


class AdaptiveOutput(OutputModule):
    """hidden -> a softmax over the first cluster's tokens and the other clusters, and within each of these a softmax over its
    tokens, by a product as narrow as the cluster's embeddings (Grave et al. 2017, arXiv:1609.04309).

    Attributes:
      cutoffs, narrowing: see `AdaptiveEmbedding`, whose tables a tied output uses.
    """

    embed_dim: int
    cutoffs: tuple[int, ...]
    narrowing: int
    kernel_init: Initializer
    projection_init: Initializer
    dtype: Any = jnp.float32

    def setup(self):
        self.clusters = clusters(self.vocab_size, self.cutoffs)
        sizes = widths(self.embed_dim, self.narrowing, len(self.clusters))
        self.projections = [
            Dense(width, use_bias=False, kernel_init=self.projection_init, dtype=self.dtype, name=f"projection_{i}")
            for i, width in enumerate(sizes[1:], 1)
            if self.narrowing > 1
        ]
        self.cluster_kernel = self.param("cluster_kernel", self.projection_init, (len(self.cutoffs), self.embed_dim))
        self.cluster_bias = self.param("cluster_bias", nn.initializers.zeros, (len(self.cutoffs),))
        self.bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
        if not self.tied:
            self.tables = tuple(
                self.param(f"kernel_{i}", self.kernel_init, (end - start, width))
                for i, ((start, end), width) in enumerate(zip(self.clusters, sizes, strict=True))
            )

    def _matrices(self, tables):
        """Matrix and bias of each softmax: of the first cluster with the others' own entries behind its tokens, then of these."""
        tables = tables if self.tied else self.tables
        biases = [self.bias[start:end] for start, end in self.clusters]
        matrices = [jnp.concatenate([tables[0], self.cluster_kernel]), *tables[1:]]
        biases[0] = jnp.concatenate([biases[0], self.cluster_bias])
        return [(matrix.astype(self.dtype), bias) for matrix, bias in zip(matrices, biases, strict=True)]

    def _inputs(self, hidden_BTD):
        """What each softmax reads, [N, width] each."""
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).astype(self.dtype)
        if not self.projections:
            return [hidden_ND] * len(self.clusters)
        return [hidden_ND, *(project(hidden_ND) for project in self.projections)]

    def _log_probs(self, inputs, matrices, temperature):
        log_probs = [
            jax.nn.log_softmax(plain_logits(hidden_ND / temperature, matrix, bias / temperature, tied=True))
            for hidden_ND, (matrix, bias) in zip(inputs, matrices, strict=True)
        ]
        size = self.cutoffs[0]
        within = [own + log_probs[0][:, size + i, None] for i, own in enumerate(log_probs[1:])]
        return jnp.concatenate([log_probs[0][:, :size], *within], axis=-1)

    def logits(self, hidden_BTD: Array, tables: tuple[Array, ...]) -> Array:
        """Log probabilities, float32 [B, T, V]."""
        log_probs_NV = self._log_probs(self._inputs(hidden_BTD), self._matrices(tables), 1.0)
        return log_probs_NV.reshape(*hidden_BTD.shape[:2], self.vocab_size)

    def score(self, hidden_BTD: Array, targets_BT: Array, tables: tuple[Array, ...], temperature: float = 1.0) -> TokenScores:
        """Scores of the targets; the temperature divides the logits of each softmax."""
        matrices = self._matrices(tables)

        def log_probs(*inputs):
            return self._log_probs(inputs, matrices, temperature)

        return score_by_log_probs(log_probs, tuple(self._inputs(hidden_BTD)), targets_BT, self.vocab_size)

    def loss_sums(
        self, hidden_BTD: Array, targets_BT: Array, weights_BT: Array, tables: tuple[Array, ...], label_smoothing: float
    ) -> LossSums:
        """Summed losses of the targets: of the first softmax those of all, of each other those of its cluster."""
        assert not label_smoothing, "lm.config refuses it"
        targets_N, weights_N = targets_BT.reshape(-1), weights_BT.reshape(-1)
        cluster_N = jnp.searchsorted(jnp.array(self.cutoffs), targets_N, side="right")
        first_N = jnp.where(cluster_N == 0, targets_N, self.cutoffs[0] + cluster_N - 1)
        found = []
        softmaxes = zip(self._inputs(hidden_BTD), self._matrices(tables), self.clusters, strict=True)
        for i, (hidden_ND, (matrix, bias), (start, end)) in enumerate(softmaxes):
            own_N = jnp.clip(targets_N - start, 0, end - start - 1) if i else first_N
            own_weights_N = jnp.where(cluster_N == i, weights_N, 0) if i else weights_N
            found.append(loss_sums(hidden_ND, matrix, bias, own_N, own_weights_N, True, 0.0))
        return jax.tree.map(lambda *sums: sum(sums), *found)
