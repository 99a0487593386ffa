"""What is learnt: (params, carry, batch, key, train) -> local sums and the carry afterwards."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.data.batches import Batch
from lm.models.language_model import LanguageModel

Sums = Mapping[str, jax.Array]
Objective = Callable[[Any, Any, Batch, jax.Array, bool], tuple[Sums, Any]]


def causal_language_model(model: LanguageModel, label_smoothing: float = 0.0) -> Objective:
    """Predict each token from those before it.

    The sums are `objective`, which is differentiated; `loss`, the plain negative log likelihood in nats; and `weight`, the
    denominator of both. With label smoothing ε (Szegedy et al. 2016, arXiv:1512.00567) the objective's target is 1 - ε on
    the token and ε spread evenly over the vocabulary.
    """

    def objective(params, carry, batch: Batch, key, train):
        sums, carry = model.apply(
            {"params": params},
            batch.inputs_BT,
            batch.targets_BT,
            batch.loss_weights_BT,
            carry,
            label_smoothing=label_smoothing,
            segments_BT=batch.segments_BT,
            rows_B=batch.rows_B,
            train=train,
            rngs={"dropout": key} if train else None,
            method="loss_sums",
        )
        return {**sums._asdict(), "weight": jnp.sum(batch.loss_weights_BT)}, carry

    return objective


def reset_rows(carry, reset_B):
    """The carry with the rows emptied where `reset_B`; an empty carry is all zeros. None stays None."""

    def reset(leaf):
        return jnp.where(reset_B.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.zeros((), leaf.dtype), leaf)

    return jax.tree.map(reset, carry)
