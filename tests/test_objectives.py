"""The causal objective against NumPy: sums, weights, label smoothing, padding; and the emptying of rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from lm.data.batches import Batch
from lm.models.build import build
from lm.objectives import activation_penalties, causal_language_model, reset_rows

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


# --- activation penalties


def test_activation_penalties_are_means_where_all_tokens_weigh_the_same(rng):
    """As Merity et al. write them: the mean of squares, and the mean of the squares of T - 1 differences."""
    last, dropped = (rng.normal(size=(B, T, 5)).astype(np.float32) for _ in range(2))
    square, change = activation_penalties(last, dropped, np.ones((B, T), np.float32))
    np.testing.assert_allclose(square / (B * T), np.mean(np.square(dropped)), rtol=1e-6)
    np.testing.assert_allclose(change / (B * T), np.mean(np.square(last[:, 1:] - last[:, :-1])), rtol=1e-6)
    square, change = activation_penalties(last[:, :1], dropped[:, :1], np.ones((B, 1), np.float32))
    np.testing.assert_allclose(square / B, np.mean(np.square(dropped[:, 0])), rtol=1e-6)
    assert change == 0


def test_activation_penalties_see_no_change_between_documents(rng):
    """Token by token with its weight, row by row; what is beside a document or in padding cannot matter."""
    last, dropped = (rng.normal(size=(B, T, 5)).astype(np.float32) for _ in range(2))
    weights = (rng.uniform(0.2, 2, (B, T)) * (SEGMENTS > 0)).astype(np.float32)
    square, change = activation_penalties(last, dropped, weights, SEGMENTS)
    want_square = want_change = 0.0
    for row in range(B):
        changes, of_changes = 0.0, 0.0
        for t in range(T):
            want_square += weights[row, t] * np.mean(np.square(dropped[row, t]))
            if t and SEGMENTS[row, t] and SEGMENTS[row, t] == SEGMENTS[row, t - 1]:
                changes += weights[row, t] * np.mean(np.square(last[row, t] - last[row, t - 1]))
                of_changes += weights[row, t]
        want_change += changes / of_changes * weights[row].sum() if of_changes else 0.0
    np.testing.assert_allclose([square, change], [want_square, want_change], rtol=1e-6)


def test_activation_penalties_of_a_padded_step_are_those_of_the_step(rng):
    """Steps of random length stand in a few compiled ones: what pads them changes no penalty, nor does a row of one token."""
    last, dropped = (rng.normal(size=(B, 9, 5)).astype(np.float32) for _ in range(2))
    for length in (1, 4, 9):
        valid = np.broadcast_to(np.arange(9) < length, (B, 9))
        padded = activation_penalties(last, dropped, valid.astype(np.float32), valid.astype(np.int32))
        alone = activation_penalties(last[:, :length], dropped[:, :length], np.ones((B, length), np.float32))
        np.testing.assert_allclose(padded, alone, rtol=1e-6)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["stream", "documents"])
def test_activation_penalties_are_in_the_objective_alone(segments, tiny, random_params, rng):
    """With the factors that the config says, of what dropout has left; `loss` stays plain."""
    model = build(tiny("lstm", model__output_dropout_rate=0.5, model__dropout_rate=0.5), V)
    params, batch = random_params(model), batch_of(rng, segments)
    key = jax.random.key(3)

    def sums(*penalties):
        return causal_language_model(model, 0.0, *penalties)(params, None, batch, key, True)[0]

    plain, both, one = sums(), sums(200.0, 5e3), sums(None, 5e3)  # big, so that a difference of sums shows them
    _, sown = model.apply(
        {"params": params},
        batch.inputs_BT,
        segments_BT=segments,
        rows_B=batch.rows_B,
        train=True,
        rngs={"dropout": key},
        mutable=["intermediates"],
    )
    last, dropped = (sown["intermediates"]["stack"][name][0] for name in ("last_hidden_BTH", "dropped_hidden_BTH"))
    valid_BT = np.ones((B, T), bool) if segments is None else segments > 0
    assert abs(np.mean(dropped[valid_BT] == 0) - 0.5) < 0.1 and np.all(last[valid_BT] != 0)
    np.testing.assert_allclose(dropped[dropped != 0], 2 * last[dropped != 0], rtol=1e-6)
    square, change = activation_penalties(last, dropped, batch.loss_weights_BT, segments)
    np.testing.assert_allclose(both["objective"] - plain["objective"], 200 * square + 5e3 * change, rtol=1e-5)
    np.testing.assert_allclose(one["objective"] - plain["objective"], 5e3 * change, rtol=1e-5)
    for found in (both, one):
        np.testing.assert_array_equal(found["loss"], plain["loss"])
