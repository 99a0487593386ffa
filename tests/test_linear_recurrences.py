"""minGRU, minLSTM, sLSTM and mLSTM against step-by-step references in NumPy, however a text is cut, padded or packed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import linen as nn
from helpers import changed, refused

from lm.config import Config, resolve
from lm.models import linear_recurrences
from lm.models.linear_recurrences import MatrixLayer, MinimalLayer
from lm.models.recurrent import RecurrentLayer, RecurrentStack

B, T, D, H, HEADS = 3, 7, 4, 6, 2
KINDS = ("mingru", "minlstm", "slstm", "mlstm")
ZEROS = nn.initializers.zeros  # parameters are always given


def layer_of(kind):
    if kind == "mlstm":
        return MatrixLayer(H, HEADS, ZEROS)
    return RecurrentLayer(kind, H, ZEROS, ZEROS) if kind == "slstm" else MinimalLayer(kind, H, ZEROS)


def random_params(rng, kind, width_in=D):
    """Flat, float64, under the reference's names."""
    if kind == "mlstm":
        params = {}
        for name in references._OF_MLSTM:
            width = HEADS if name in ("write_gate", "forget_gate") else H
            params |= {f"{name}_kernel": rng.normal(0, 0.7, (width_in, width)), f"{name}_bias": rng.normal(0, 0.7, width)}
        return {**params, "scale": rng.normal(1, 0.3, (HEADS, H // HEADS))}
    num_gates = {"mingru": 2, "minlstm": 3, "slstm": 4}[kind]
    params = {"input_kernel": rng.normal(0, 0.7, (width_in, num_gates * H)), "bias": rng.normal(0, 0.7, num_gates * H)}
    return {**params, "recurrent_kernel": rng.normal(0, 0.7, (H, num_gates * H))} if kind == "slstm" else params


def random_state(rng, kind, rows=B):
    """As ours: with exponents taken out where the cell keeps them apart."""
    if kind == "mlstm":
        return rng.normal(size=(rows, HEADS, 3, 3)), rng.normal(size=(rows, HEADS, 3)), rng.normal(size=(rows, HEADS))
    if kind == "slstm":
        c, m, h = (rng.normal(size=(rows, H)) for _ in range(3))
        return c, rng.uniform(0.5, 2, (rows, H)), m, h
    return (rng.normal(size=(rows, H)),)


def ours(kind, flat):
    """The reference's flat parameters under our names."""
    if kind != "mlstm":
        return flat
    dense = {name: {part: flat[f"{name}_{part}"] for part in ("kernel", "bias")} for name in references._OF_MLSTM}
    return {**dense, "head_norm": {"scale": flat["scale"]}}


def whole(kind, state):
    """A state as the reference has it, exponents multiplied in."""
    if kind == "mlstm":
        matrix, vector, largest = map(np.float64, state)
        return matrix * np.exp(largest)[..., None, None], vector * np.exp(largest)[..., None]
    if kind == "slstm":
        c, n, m, h = map(np.float64, state)
        return c * np.exp(m), n * np.exp(m), h
    return (np.float64(state[0]),)


def reference(kind, params, x_BTD, state):
    """hidden_BTH, and the last state as the reference has it, from one of that kind."""
    if kind == "mlstm":
        return references.mlstm(params, x_BTD, state)
    if kind == "slstm":
        return references.slstm(params, x_BTD, state)
    hidden, last = references.minimal(params, x_BTD, state[0], kind)
    return hidden, (last,)


@functools.cache
def compiled(kind):
    layer = layer_of(kind)
    return jax.jit(
        lambda flat, x_TBD, state, valid_TB, starts_TB: layer.apply(
            {"params": ours(kind, flat)}, x_TBD, state, valid_TB, starts_TB, False
        )
    )


def float32(tree):
    return jax.tree.map(jnp.float32, tree)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_its_recurrence_step_by_step(rng, kind):
    params, x, state = random_params(rng, kind), rng.normal(size=(B, T, D)), random_state(rng, kind)
    hidden, after = compiled(kind)(*float32((params, x.swapaxes(0, 1), state)), None, None)
    want, want_after = reference(kind, params, x, whole(kind, state))
    np.testing.assert_allclose(hidden.swapaxes(0, 1), want, rtol=0, atol=2e-5)
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-4, atol=2e-5), whole(kind, after), want_after)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_overflows_that_exponentials_would(rng, kind):
    """Inputs that make gates of some hundred: the reference's exponentials overflow, ours must not."""
    params, x = random_params(rng, kind), 300 * rng.normal(size=(T, B, D))
    state = jax.tree.map(jnp.zeros_like, float32(random_state(rng, kind)))

    def loss(params, x):
        hidden, after = layer_of(kind).apply({"params": ours(kind, params)}, x, state, None, None, False)
        return jnp.sum(hidden**2) + sum(jnp.sum(leaf) * 1e-6 for leaf in after)

    for leaf in jax.tree.leaves(
        (compiled(kind)(*float32((params, x)), state, None, None), jax.grad(loss)(*float32((params, x))))
    ):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_slopes_of_the_reference(rng, kind):
    """Central differences of the float64 reference, along a random direction in each array."""
    params, x, state = random_params(rng, kind), rng.normal(size=(B, T, D)), random_state(rng, kind)
    cotangent = rng.normal(size=(B, T, H))

    def loss(params, x):
        hidden, _ = compiled(kind)(params, x.swapaxes(0, 1), float32(state), None, None)
        return jnp.sum(hidden.swapaxes(0, 1) * cotangent)

    gradients = jax.grad(loss, argnums=(0, 1))(*float32((params, x)))
    arrays = {**params, "x": x}
    found = {**gradients[0], "x": gradients[1]}
    for name, value in arrays.items():
        direction = rng.normal(size=value.shape)

        def along(size, name=name, direction=direction):
            moved = {**arrays, name: arrays[name] + size * direction}
            return np.sum(reference(kind, moved, moved["x"], whole(kind, state))[0] * cotangent)

        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        assert np.sum(direction * found[name]) == pytest.approx(slope, rel=2e-4, abs=2e-3), name


@pytest.mark.parametrize("chunk", [256, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_starts_are_each_document_alone(rng, kind, chunk, monkeypatch):
    if chunk != 256 and kind != "mlstm":
        pytest.skip("has no chunks")
    monkeypatch.setattr(linear_recurrences, "_CHUNK", chunk)
    params, x, state = random_params(rng, kind), rng.normal(size=(B, T, D)), random_state(rng, kind)
    valid_BT = np.array([[1, 1, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], bool)
    starts_BT = np.array([[0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0]], bool)
    run = jax.jit(lambda *arguments: layer_of(kind).apply({"params": ours(kind, float32(params))}, *arguments, False))
    hidden, after = run(*float32((x.swapaxes(0, 1), state)), valid_BT.T, starts_BT.T)
    hidden, after, state = np.asarray(hidden), whole(kind, after), whole(kind, state)
    for row in range(B):
        times = np.flatnonzero(valid_BT[row])
        for number, document in enumerate(np.split(times, np.flatnonzero(starts_BT[row][times]))):
            first = tuple(s[row : row + 1] * (number == 0) for s in state)
            if not len(document):
                continue
            want, last = reference(kind, params, x[row, document][None], first)
            np.testing.assert_allclose(hidden[document, row], want[0], rtol=0, atol=3e-5)
        jax.tree.map(lambda f, w, row=row: np.testing.assert_allclose(f[row], w[0], rtol=1e-4, atol=3e-5), after, last)


@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_of_a_text_equals_all_at_once(rng, kind):
    stack = RecurrentStack(kind, (H, H), ZEROS, ZEROS, num_heads=HEADS)
    params = {f"layer_{i}": ours(kind, random_params(rng, kind, (D, H)[i])) for i in range(2)}
    run = jax.jit(lambda x, carry: stack.apply({"params": float32(params)}, x, carry))
    x = np.float32(rng.normal(size=(B, 12, D)))
    carry = stack.initial_carry(B, None)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(carry)) and all(len(leaf) == B for leaf in jax.tree.leaves(carry))
    hidden, after = run(x, carry)
    for lengths in ([1, 3, 4, 1, 3], [1] * 12):
        parts, state, start = [], carry, 0
        for length in lengths:
            part, state = run(x[:, start : start + length], state)
            parts.append(part)
            start += length
        np.testing.assert_allclose(np.concatenate(parts, axis=1), hidden, rtol=0, atol=2e-5)
        for layer in after:
            jax.tree.map(
                lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-4, atol=2e-5),
                whole(kind, state[layer]),
                whole(kind, after[layer]),
            )


def test_chunks_are_the_whole(rng, monkeypatch):
    params, x, state = random_params(rng, "mlstm"), rng.normal(size=(T, B, D)), random_state(rng, "mlstm")
    found = []
    for chunk in (256, 2, 3, 7):
        monkeypatch.setattr(linear_recurrences, "_CHUNK", chunk)

        def loss(params, x, state):
            hidden, after = layer_of("mlstm").apply({"params": ours("mlstm", params)}, x, state, None, None, False)
            return jnp.sum(jnp.sin(hidden)), (hidden, after)

        found.append(jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*float32((params, x, state))))
    for other in found[1:]:
        gradients, (hidden, after) = other
        np.testing.assert_allclose(hidden, found[0][1][0], rtol=0, atol=1e-5)
        jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-3, atol=1e-4), gradients, found[0][0])
        jax.tree.map(
            lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-4, atol=1e-5),
            whole("mlstm", after),
            whole("mlstm", found[0][1][1]),
        )


def test_heads_must_divide_the_width():
    with refused("config.model.num_heads is 4", "30"):
        resolve(changed(Config(), model__architecture="mlstm", model__layer_dims=(32, 30)))
    with refused("config.model.weight_drop_rate", "mingru"):
        resolve(changed(Config(), model__architecture="mingru", model__weight_drop_rate=0.3))
