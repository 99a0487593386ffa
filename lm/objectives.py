"""What is learnt: (params, carry, batch, key, train) -> local sums and the carry afterwards."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.data.batches import Batch
from lm.models.language_model import LanguageModel

Sums = Mapping[str, jax.Array]
Objective = Callable[[Any, Any, Batch, jax.Array, bool], tuple[Sums, Any]]


def causal_language_model(
    model: LanguageModel,
    label_smoothing: float = 0.0,
    activation_penalty: float | None = None,
    temporal_activation_penalty: float | None = None,
) -> Objective:
    """Predict each token from those before it.

    The sums are `objective`, which is differentiated; `loss`, the plain negative log likelihood in nats; and `weight`, the
    denominator of both.

    Args:
      model: predicts.
      label_smoothing: ε; the objective's target is 1 - ε on the token and ε spread evenly over the vocabulary (Szegedy et al.
        2016, arXiv:1512.00567).
      activation_penalty, temporal_activation_penalty: factors of AR and TAR, see `activation_penalties`; of recurrent models.
    """
    penalties = activation_penalty or 0.0, temporal_activation_penalty or 0.0
    shown = ["intermediates"] if any(penalties) else []

    def objective(params, carry, batch: Batch, key, train):
        (sums, carry), sown = model.apply(
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
            mutable=shown,
        )
        named = {**sums._asdict(), "weight": jnp.sum(batch.loss_weights_BT)}
        if shown:
            (last_BTH,), (dropped_BTH,) = (
                sown["intermediates"]["stack"][name] for name in ("last_hidden_BTH", "dropped_hidden_BTH")
            )
            square, change = activation_penalties(last_BTH, dropped_BTH, batch.loss_weights_BT, batch.segments_BT)
            named["objective"] += penalties[0] * square + penalties[1] * change
        return named, carry

    return objective


def activation_penalties(last_BTH, dropped_BTH, loss_weights_BT, segments_BT=None) -> tuple[jax.Array, jax.Array]:
    """Activation and temporal activation regularisation (Merity et al. 2017, arXiv:1708.01009), as sums over tokens.

    Divided by the sum of the weights, the first is the mean square of the output after dropout and the second that of the
    change from one token to the next before dropout, over the changes that each row has: one fewer than it has tokens, or
    than each of its documents has. A row counts as much as its tokens.

    Args:
      last_BTH, dropped_BTH: the last layer's output before and after dropout, in any precision; squared in float32.
      loss_weights_BT: a token's squares count as much as the token, a change as much as the later one.
      segments_BT: between two documents, and from or to padding, there is no change.
    """
    square = jnp.sum(jnp.mean(jnp.square(dropped_BTH.astype(jnp.float32)), axis=-1) * loss_weights_BT)
    weights_BT = loss_weights_BT[:, 1:]
    if segments_BT is not None:
        weights_BT = weights_BT * ((segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] > 0))
    change_BT = jnp.mean(jnp.square(jnp.diff(last_BTH.astype(jnp.float32), axis=1)), axis=-1)
    of_changes_B, of_tokens_B = jnp.sum(weights_BT, axis=1), jnp.sum(loss_weights_BT, axis=1)
    mean_change_B = jnp.sum(change_BT * weights_BT, axis=1) / jnp.where(of_changes_B > 0, of_changes_B, 1.0)
    return square, jnp.sum(mean_change_B * of_tokens_B)


def reset_rows(carry, reset_B):
    """The carry with the rows emptied where `reset_B`; an empty carry is all zeros. None stays None."""

    def reset(leaf):
        return jnp.where(reset_B.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.zeros((), leaf.dtype), leaf)

    return jax.tree.map(reset, carry)
