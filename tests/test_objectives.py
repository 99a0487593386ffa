"""The causal objective against NumPy: sums, weights, label smoothing, padding; and the emptying of rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from lm.data.batches import Batch
from lm.models.build import build
from lm.objectives import causal_language_model, reset_rows

B, T, V = 3, 6, 11
# Row 0: two documents, padding inside; row 1: padding first; row 2: padding alone.
SEGMENTS = np.array([[1, 1, 0, 2, 2, 0], [0, 0, 1, 1, 1, 1], [0] * T], np.int32)


@functools.cache
def compiled(tiny, random_params, architecture, label_smoothing):
    """(params, carry, batch) -> sums, carry, gradient of the objective; dropout is on, but `train` is not."""
    window = {"model__attention_window": 4} if architecture == "transformer" else {"model__weight_drop_rate": 0.3}
    model = build(tiny(architecture, model__num_layers=1, model__dropout_rate=0.5, **window), V)
    objective = causal_language_model(model, label_smoothing)

    @functools.partial(jax.jit, static_argnums=3)
    def run(params, carry, batch, train):
        def total(params):
            sums, after = objective(params, carry, batch, jax.random.key(2), train)
            return sums["objective"], (sums, after)

        gradient, (sums, after) = jax.grad(total, has_aux=True)(params)
        hidden = model.apply({"params": params}, batch.inputs_BT, carry, segments_BT=batch.segments_BT).hidden_BTD
        return sums, after, gradient, model.apply({"params": params}, hidden, method="logits")

    return model, random_params(model), run


def batch_of(rng, segments):
    inputs, targets = (rng.integers(0, V, (B, T)).astype(np.int32) for _ in range(2))
    loss_weights = (rng.uniform(0.2, 2, (B, T)) * (1 if segments is None else segments > 0)).astype(np.float32)
    return Batch(inputs, targets, loss_weights, segments, np.zeros(B, bool), np.arange(B, dtype=np.int32))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_sums_equal_numpy(tiny, random_params, rng, label_smoothing):
    """Cross entropy against the smoothed target, written out as a distribution over the vocabulary; `loss` stays plain."""
    model, params, run = compiled(tiny, random_params, "lstm", label_smoothing)
    batch = batch_of(rng, SEGMENTS)
    carry = jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32), model.initial_carry(B, T))
    sums, after, _, logits = run(params, carry, batch, False)
    log_prob = log_softmax(np.asarray(logits, np.float64), axis=-1)
    hard = np.eye(V)[batch.targets_BT]
    soft = (1 - label_smoothing) * hard + label_smoothing / V
    for name, target in (("loss", hard), ("objective", soft)):
        want = -np.sum(np.sum(target * log_prob, axis=-1) * batch.loss_weights_BT)
        np.testing.assert_allclose(sums[name], want, rtol=2e-6)
    np.testing.assert_allclose(sums["weight"], batch.loss_weights_BT.sum(), rtol=1e-6)
    assert set(sums) == {"objective", "loss", "weight"}
    assert jax.tree.structure(after) == jax.tree.structure(carry)


@pytest.mark.parametrize("architecture", ["lstm", "transformer"])
def test_what_padding_holds_cannot_change_loss_gradient_or_carry(tiny, random_params, rng, architecture):
    model, params, run = compiled(tiny, random_params, architecture, 0.0)
    batch = batch_of(rng, SEGMENTS)
    padding = SEGMENTS == 0
    other = batch.replace(
        inputs_BT=np.where(padding, rng.integers(0, V, (B, T)), batch.inputs_BT).astype(np.int32),
        targets_BT=np.where(padding, rng.integers(0, V, (B, T)), batch.targets_BT).astype(np.int32),
    )
    assert not np.array_equal(batch.inputs_BT, other.inputs_BT) and not np.array_equal(batch.targets_BT, other.targets_BT)
    results = [run(params, model.initial_carry(B, 2 * T), rows, True)[:3] for rows in (batch, other)]

    def visible(result):
        sums, carry, gradient = result
        # A cache's empty slots hold whatever they hold; which ones are empty is in `ordinal_BS`.
        return sums, carry if architecture == "lstm" else carry["slots"], gradient

    jax.tree.map(np.testing.assert_array_equal, visible(results[0]), visible(results[1]))


def test_dropout_is_on_in_training_only(tiny, random_params, rng):
    model, params, run = compiled(tiny, random_params, "lstm", 0.0)
    batch = batch_of(rng, SEGMENTS)
    plain, dropped = (run(params, model.initial_carry(B), batch, train) for train in (False, True))
    log_prob = log_softmax(np.asarray(plain[3], np.float64), axis=-1)
    want = -np.sum(np.take_along_axis(log_prob, batch.targets_BT[..., None], axis=-1)[..., 0] * batch.loss_weights_BT)
    np.testing.assert_allclose(plain[0]["loss"], want, rtol=2e-6)
    assert abs(dropped[0]["loss"] - want) > 1e-3


def test_reset_empties_exactly_the_named_rows(rng):
    carry = {"layer_0": (rng.normal(size=(4, 3)), rng.normal(size=(4, 2, 5, 2))), "next_B": np.arange(1, 5)}
    carry = jax.tree.map(jnp.asarray, carry)
    reset = np.array([True, False, False, True])
    found = reset_rows(carry, reset)
    for before, after in zip(jax.tree.leaves(carry), jax.tree.leaves(found), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(after[~reset], before[~reset])
        assert not np.any(after[reset])
    assert reset_rows(None, reset) is None
