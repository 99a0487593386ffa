"""The layers that architectures share: initialisers, dropout masks, the embedding, norms, feed-forward, positions, segments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import linen as nn

from lm.models import layers
from lm.models.layers import Dropout, Embedding, FeedForward, gatewise, initializer, keep_mask, row_keep_mask

# --- initialisers


@pytest.mark.parametrize(
    ("name", "bound", "deviation"),
    [
        ("uniform", 0.07, 0.07 / 3**0.5),
        ("normal", None, 0.07),
        ("xavier_uniform", (6 / (300 + 500)) ** 0.5, (2 / (300 + 500)) ** 0.5),
        ("xavier_normal", None, (2 / (300 + 500)) ** 0.5),
        ("he_uniform", (6 / 300) ** 0.5, (2 / 300) ** 0.5),
        ("he_normal", None, (2 / 300) ** 0.5),
        ("orthogonal", None, 100**-0.5),
    ],
)
def test_initialisers_have_their_bounds_and_deviations(name, bound, deviation):
    """300 inputs, 500 outputs: Glorot's and He's formulas; the scale is read by uniform and normal alone."""
    shape = (300, 500) if name != "orthogonal" else (60, 100)
    matrix = np.asarray(initializer(name, 0.07)(jax.random.key(2), shape))
    assert abs(matrix.mean()) < 5 * deviation / matrix.size**0.5
    np.testing.assert_allclose(matrix.std(), deviation, rtol=0.015)
    if bound is not None:
        assert 0.999 * bound < np.abs(matrix).max() <= bound
        assert abs(np.mean(np.abs(matrix) < bound / 2) - 0.5) < 0.01  # flat, not a bell
    if name == "orthogonal":
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(60), atol=1e-5)


def test_gates_are_initialised_each_as_a_matrix_of_its_own():
    kernel = np.asarray(gatewise(initializer("orthogonal", 1.0), 3)(jax.random.key(0), (8, 24)))
    gates = np.split(kernel, 3, axis=1)
    for gate in gates:
        np.testing.assert_allclose(gate.T @ gate, np.eye(8), atol=1e-5)
    assert not np.allclose(gates[0], gates[1]) and not np.allclose(gates[1], gates[2])
    wide = np.asarray(gatewise(initializer("xavier_uniform", 1.0), 4)(jax.random.key(0), (50, 4 * 50)))
    assert 0.98 < np.abs(wide).max() / (6 / 100) ** 0.5 <= 1  # the fan of a gate, not of the fused matrix


# --- dropout


@pytest.mark.parametrize("shape", [(1001, 77), (3,), (1,)])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.93])
def test_keep_mask_keeps_the_right_share_everywhere(shape, rate):
    """Also where the size is odd, and for each entry by itself: two entries share 32 random bits."""
    num_masks = max(1, 20_000 // int(np.prod(shape)))
    keys = jax.random.split(jax.random.key(4), num_masks)
    masks = np.asarray(jax.vmap(lambda key: keep_mask(key, shape, rate))(keys)).reshape(num_masks, -1)
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(masks.mean() - (1 - rate)) < 5 * deviation / masks.size**0.5
    entries = masks[:, ::-1] if masks.shape[1] < 4 else masks.reshape(-1, 77)  # the first and the last entry, each by itself
    assert np.all(np.abs(entries.mean(axis=0) - (1 - rate)) < 5 * deviation / len(entries) ** 0.5)
    if entries.shape[1] > 1:  # neighbours, which share the bits, do not share their fate
        together = np.corrcoef(entries[:, 0], entries[:, 1])[0, 1]
        assert abs(together) < 5 / len(entries) ** 0.5


def test_a_rate_near_one_keeps_next_to_nothing():
    """It would round to the 2^16 that no 16 bits reach."""
    assert keep_mask(jax.random.key(0), (10_000,), 0.999999).mean() < 0.01


def test_row_masks_follow_the_global_row():
    key, make = jax.random.key(0), functools.partial(row_keep_mask, shape=(5, 3), rate=0.5)
    all_rows = np.asarray(make(key, jnp.arange(8)))
    np.testing.assert_array_equal(make(key, jnp.array([6, 1])), all_rows[[6, 1]])
    np.testing.assert_array_equal(make(key, jnp.arange(8), row_axis=1), all_rows.swapaxes(0, 1))
    assert len(np.unique(all_rows, axis=0)) == 8
    assert not np.array_equal(make(jax.random.key(1), jnp.arange(8)), all_rows)


@pytest.mark.parametrize("row_axis", [0, 1])
def test_dropout_scales_what_it_keeps_and_can_be_constant_over_an_axis(rng, row_axis):
    x = rng.uniform(1, 2, (6, 7, 8)).astype(np.float32)
    constant = 1 - row_axis
    dropped = np.asarray(
        Dropout(0.25, constant_axis=constant, row_axis=row_axis).apply({}, x, None, True, rngs={"dropout": jax.random.key(0)})
    )
    kept = dropped != 0
    np.testing.assert_allclose(dropped, np.where(kept, x / 0.75, 0), rtol=1e-6)
    np.testing.assert_array_equal(kept, np.broadcast_to(kept.take([0], axis=constant), kept.shape))
    assert len(np.unique(kept.take(0, axis=constant), axis=0)) > 3
    np.testing.assert_array_equal(Dropout(0.25).apply({}, x, None, False), x)  # not training: no random stream needed
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, None, True), x)


# --- the embedding


def test_look_up_equals_one_hot_product_in_value_and_gradient(rng, monkeypatch):
    """Tokens that repeat and tokens that never occur, with whole words dropped and a multiplier."""
    tokens = np.array([[0, 3, 3, 6], [6, 1, 0, 3]])
    cotangents = jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32), jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    embedding = Embedding(7, 5, nn.initializers.zeros, word_dropout_rate=0.4, multiplier=1.7)
    params = {"table": rng.normal(size=(7, 5)).astype(np.float32)}

    def one_hot_product(table_VD, tokens_BT):
        return jnp.matmul(jax.nn.one_hot(tokens_BT, 7), table_VD, precision="highest"), table_VD

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def run(params, look_up, train):
        monkeypatch.setattr(layers, "look_up", look_up)

        def embed(params):
            return embedding.apply({"params": params}, tokens, train, rngs={"dropout": jax.random.key(3)})

        (value, table), backward = jax.vjp(embed, params)
        assert table.shape == (7, 5)
        return value, backward(cotangents)[0]["table"]

    looked_up = layers.look_up
    for train in (False, True):
        value, gradient = run(params, looked_up, train)
        by_product, gradient_by_product = run(params, one_hot_product, train)
        np.testing.assert_array_equal(value, by_product)
        np.testing.assert_allclose(gradient, gradient_by_product, rtol=1e-6, atol=1e-6)
        if not train:
            np.testing.assert_allclose(value, 1.7 * params["table"][tokens], rtol=1e-6)
            changed = np.any(gradient != cotangents[1], axis=1)  # the rest of the gradient is what an output would send
            np.testing.assert_array_equal(changed, np.isin(np.arange(7), tokens))


def test_word_dropout_drops_whole_types_everywhere(rng):
    vocab_size = 3001
    embedding = Embedding(vocab_size, 2, nn.initializers.zeros, word_dropout_rate=0.2)
    table = rng.uniform(1, 2, (vocab_size, 2)).astype(np.float32)
    tokens = rng.permutation(np.repeat(np.arange(vocab_size), 2)).reshape(2, -1)  # every type twice, at random places
    vectors, _ = embedding.apply({"params": {"table": table}}, tokens, True, rngs={"dropout": jax.random.key(0)})
    vectors = np.asarray(vectors)
    kept = np.all(vectors != 0, axis=-1)
    np.testing.assert_array_equal(kept, np.any(vectors != 0, axis=-1))
    kept_type = np.zeros(vocab_size, bool)
    kept_type[tokens[kept]] = True
    np.testing.assert_array_equal(kept, kept_type[tokens])
    np.testing.assert_allclose(vectors[kept], table[tokens[kept]] / 0.8, rtol=1e-6)
    assert abs(kept_type.mean() - 0.8) < 5 * (0.2 * 0.8 / vocab_size) ** 0.5


# --- norms and feed-forward


def assert_gradients_equal(module, params, x, cotangent, expected):
    """Value and gradients of a module against a reference's, at float32's rounding of sums of a few dozen terms."""

    @jax.jit
    def run(params, x):
        value, backward = jax.vjp(lambda params, x: module.apply({"params": params}, x), params, x)
        return value, *backward(cotangent)

    want_value, (want_params, want_x) = expected
    found, wanted = run(params, x), (want_value, want_params, want_x)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6 * np.abs(b).max()), found, wanted)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_equal_numpy(rng, name):
    """Inputs far from mean zero, and a row so small that epsilon counts."""
    x = (rng.normal(1.5, 2, (2, 3, 7)) * np.array([[[1], [30], [1e-3]]])).astype(np.float32)
    params = {"scale": rng.normal(size=7).astype(np.float32)}
    if name == "layer_norm":
        params["bias"] = rng.normal(size=7).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    value, backward = getattr(references, name)(params, x)
    assert_gradients_equal(layers.norm(name, jnp.float32), params, x, cotangent, (value, backward(cotangent)))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "swiglu"])
def test_feed_forward_equals_numpy(rng, activation):
    gated = activation == "swiglu"
    names = {"inward": "in", "outward": "out"} | ({"gate": "gate"} if gated else {})
    shapes = {"in": (5, 9), "gate": (5, 9), "out": (9, 5)}
    flat = {f"{short}_kernel": rng.normal(size=shapes[short]).astype(np.float32) for short in names.values()}
    if not gated:
        flat |= {f"{short}_bias": rng.normal(size=shapes[short][1]).astype(np.float32) for short in names.values()}

    def nested(flat):
        return {
            ours: {kind: flat[f"{short}_{kind}"] for kind in ("kernel", "bias") if f"{short}_{kind}" in flat}
            for ours, short in names.items()
        }

    x, cotangent = (rng.normal(size=(2, 3, 5)).astype(np.float32) for _ in range(2))
    value, backward = references.feed_forward(flat, x, activation)
    d_params, d_x = backward(cotangent)
    module = FeedForward(9, 5, activation, nn.initializers.zeros, nn.initializers.zeros)
    assert_gradients_equal(module, nested(flat), x, cotangent, (value, (nested(d_params), d_x)))


def test_the_exact_gelu_of_a_bfloat16_is_as_near_as_one_can_be():
    """1 + erf(x / sqrt(2)) in so few bits would be off by half at -3."""
    module = FeedForward(1, 1, "gelu", nn.initializers.ones, nn.initializers.ones, dtype=jnp.bfloat16)
    x = jnp.linspace(-4, 4, 65, dtype=jnp.bfloat16)[:, None, None]
    value = module.apply(module.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(
        np.asarray(value, np.float64), references.gelu(np.asarray(x, np.float64))[0], rtol=2**-8, atol=1e-6
    )


# --- positions


POSITIONS = np.array([0, 1, 2, 7, 1023, 1024, 1025, 100_003, 1_000_003, 2**31 - 2], np.int64)


def exact_angles(width):
    return POSITIONS[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)


def test_sinusoidal_positions_are_exact_however_far():
    """float32 alone would be off by 0.006 at a million and by everything at two thousand million."""
    found = layers.sinusoidal(jnp.asarray(POSITIONS[None], jnp.int32), 10)[0]
    turn = exact_angles(10)
    np.testing.assert_allclose(found, np.concatenate([np.sin(turn), np.cos(turn)], axis=1), rtol=0, atol=1e-6)


def test_rotation_is_exact_however_far(rng):
    x = rng.normal(size=(1, len(POSITIONS), 3, 8)).astype(np.float32)
    found = layers.rotate(jnp.asarray(x), jnp.asarray(POSITIONS[None], jnp.int32))[0]
    turned = (x[0, ..., :4] + 1j * x[0, ..., 4:]) * np.exp(1j * exact_angles(8))[:, None]
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), rtol=0, atol=2e-6)


def test_rotated_products_depend_on_the_distance_only(rng):
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(at_q, at_k):
        return np.sum(layers.rotate(q, jnp.array([[at_q]])) * layers.rotate(k, jnp.array([[at_k]])))

    np.testing.assert_allclose(product(1_000_003, 1_000_000), product(3, 0), atol=1e-5)
    assert abs(product(4, 0) - product(3, 0)) > 1e-2


# --- segments


def test_segment_runs_by_hand():
    segments = np.array([[1, 1, 2, 2, 0, 2], [0, 3, 0, 3, 1, 3], [0, 0, 0, 0, 0, 0], [4, 0, 0, 5, 5, 0]])
    valid, runs = layers.segment_runs(jnp.asarray(segments))
    np.testing.assert_array_equal(valid, segments > 0)
    np.testing.assert_array_equal(runs, [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 2], [0] * 6, [0, 0, 0, 1, 1, 1]])
