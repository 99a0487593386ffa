"""Attention against NumPy, forward and backward; who sees whom, token by token; the cache's slots; dropout of weights."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import linen as nn

from lm.models import attention as attention_module
from lm.models.attention import Attention, attend, attend_causally, causal, empty_slots, mix, places

B, T, D, HEADS = 2, 6, 8, 2
ZEROS = nn.initializers.zeros  # parameters are always given
NAMES = {"query": "query", "key": "key", "value": "value", "outward": "out"}


def nested(flat):
    """The reference's flat parameters under our names."""
    return {ours: {kind: flat[f"{theirs}_{kind}"] for kind in ("kernel", "bias")} for ours, theirs in NAMES.items()}


@pytest.mark.parametrize(("window", "rotary"), [(None, False), (None, True), (3, True)])
def test_attention_and_gradients_equal_numpy(rng, window, rotary):
    flat = {f"{name}_kernel": rng.normal(0, 0.5, (D, D)).astype(np.float32) for name in NAMES.values()}
    flat |= {f"{name}_bias": rng.normal(0, 0.5, D).astype(np.float32) for name in NAMES.values()}
    x, cotangent = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    attention = Attention(D, HEADS, rotary, ZEROS, ZEROS)

    @jax.jit
    def run(params, x):
        def forward(params, x):
            where, _ = places((B, T), None, None, window)
            (mixed, _), sown = attention.apply({"params": params}, x, where, mutable=["intermediates"])
            return mixed, sown["intermediates"]["attention_weights"]

        mixed, backward, (weights,) = jax.vjp(forward, params, x, has_aux=True)
        return mixed, weights, backward(cotangent)

    mixed, weights, gradients = run(nested(flat), x)
    want, want_weights, backward = references.attention(flat, x, HEADS, window, rotary)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
    distance = np.arange(T)[:, None] - np.arange(T)
    unseen = (distance < 0) | (distance >= (window or T))
    assert np.all(np.asarray(weights)[..., unseen] == 0) and np.all(np.asarray(weights)[..., ~unseen] > 0)
    np.testing.assert_allclose(mixed, want, rtol=1e-5, atol=3e-6)
    d_flat, d_x = backward(cotangent)
    assert jax.tree.structure(gradients) == jax.tree.structure((nested(d_flat), d_x))
    # The key's bias has no effect, so its true gradient is zero: absolute tolerance, at sums of some dozen terms up to ten.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradients, (nested(d_flat), d_x))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", ["relative", "normed", "both", "normed and rotated"])
def test_relative_positions_and_normed_queries_equal_numpy(rng, window, kind):
    """The gradient by central differences of the reference along a random direction."""
    flat = {f"{name}_kernel": rng.normal(0, 0.5, (D, D)) for name in NAMES.values()}
    flat |= {f"{name}_bias": rng.normal(0, 0.5, D) for name in NAMES.values()}
    is_relative, is_rotated = kind in ("relative", "both"), kind == "normed and rotated"
    if is_relative:
        flat |= {"distance_kernel": rng.normal(0, 0.5, (D, D))}
        flat |= {name: rng.normal(0, 0.5, (HEADS, D // HEADS)) for name in ("content_bias", "distance_bias")}
    if kind != "relative":
        flat |= {name: rng.normal(1, 0.3, D // HEADS) for name in ("query_scale", "key_scale")}
    attention = Attention(
        D, HEADS, is_rotated, ZEROS, ZEROS, relative=is_relative, norm=None if kind == "relative" else "rms_norm"
    )

    def ours(flat):
        found = nested(flat)
        if is_relative:
            found |= {"distance": {"kernel": flat["distance_kernel"]}}
            found |= {name: flat[name] for name in ("content_bias", "distance_bias")}
        if kind != "relative":
            found |= {f"{name}_norm": {"scale": flat[f"{name}_scale"]} for name in ("query", "key")}
        return found

    x, cotangent = (rng.normal(size=(B, T, D)) for _ in range(2))

    def theirs(flat, x):
        return references.looked_up_attention(flat, x, HEADS, window, kind != "relative", is_rotated)

    @jax.jit
    def run(flat, x):
        def forward(flat, x):
            where, _ = places((B, T), None, None, window, with_distances=True)
            (mixed, _), sown = attention.apply({"params": ours(flat)}, x, where, mutable=["intermediates"])
            return mixed, sown["intermediates"]["attention_weights"]

        mixed, backward, (weights,) = jax.vjp(forward, flat, x, has_aux=True)
        return mixed, weights, backward(jnp.float32(cotangent))

    arguments = jax.tree.map(jnp.float32, (flat, x))
    mixed, weights, gradient = run(*arguments)
    want, want_weights = theirs(flat, x)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mixed, want, rtol=1e-4, atol=1e-5)
    for leaf in [*flat, "x"]:  # a direction for each array, so that none hides behind another

        def along(size, leaf=leaf):
            rng = np.random.default_rng(5)
            moved = {name: value + size * rng.normal(size=value.shape) * (name == leaf) for name, value in flat.items()}
            return np.sum(theirs(moved, x + size * np.random.default_rng(6).normal(size=x.shape) * (leaf == "x"))[0] * cotangent)

        rng = np.random.default_rng(5)
        directions = {name: rng.normal(size=value.shape) * (name == leaf) for name, value in flat.items()}
        slope = sum(np.sum(directions[name] * gradient[0][name]) for name in flat)
        slope += np.sum(np.random.default_rng(6).normal(size=x.shape) * gradient[1]) * (leaf == "x")
        assert slope == pytest.approx((along(1e-5) - along(-1e-5)) / 2e-5, rel=1e-4, abs=2e-4), leaf


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize(("queries", "scores"), [(256, 1 << 24), (2, 1 << 24), (2, 3 * 9 * 9), (1, 1)])
def test_attention_in_blocks_of_queries_and_some_heads_at_a_time_is_attention(rng, window, queries, scores, monkeypatch):
    """Blocks of one, two or all queries; all six heads of all rows, three, or one at a time."""
    monkeypatch.setattr(attention_module, "_queries_at_once", lambda: queries)
    monkeypatch.setattr(attention_module, "_SCORES_AT_ONCE", scores)
    q, k, v, cotangent = (rng.normal(size=(2, 9, 3, 4)).astype(np.float32) for _ in range(4))

    def gradients_of(function):
        def run(q, k, v):
            mixed, backward = jax.vjp(function, q, k, v)
            return mixed, *backward(cotangent)

        return jax.jit(run)(q, k, v)

    plain = gradients_of(lambda q, k, v: attend(q, k, v, causal(0, 9, 0, 9, window))[0])
    blocks = gradients_of(lambda q, k, v: attend_causally(q, k, v, window))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), blocks, plain)


@pytest.mark.parametrize("queries", [5, 1])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_what_is_mixed_without_weights_and_its_gradients_are_those_of_a_softmax(rng, shape, queries):
    """Also the gradient of what is added to the scores, once for all rows and heads, for each, or for all rows or heads."""
    q, cotangent = (jnp.asarray(rng.normal(size=(2, 3, queries, 4)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, 3, 7, 4)), jnp.float32) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=(*shape, queries, 7)), jnp.float32).at[..., 3].set(jnp.finfo(jnp.float32).min)

    def plain(q, k, v, bias):
        return jax.nn.softmax(q @ k.swapaxes(2, 3) + bias) @ v

    def run(function):
        mixed, backward = jax.vjp(function, q, k, v, bias)
        return mixed, function(q, k, v, bias), backward(cotangent)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), run(mix), run(plain))
    assert mix(*(x.astype(jnp.bfloat16) for x in (q, k, v)), bias).dtype == jnp.bfloat16
    halves = jax.vjp(mix, *(x.astype(jnp.bfloat16) for x in (q, k, v)), bias)[1](cotangent.astype(jnp.bfloat16))
    assert [x.dtype for x in halves] == [jnp.bfloat16] * 3 + [jnp.float32]
    for half, whole in zip(halves, run(plain)[2], strict=True):
        np.testing.assert_allclose(half.astype(jnp.float32), whole, atol=2**-6 * np.abs(whole).max())


@pytest.mark.parametrize("window", [None, 3])
def test_what_flash_attention_is_asked_for_is_attention(rng, window, monkeypatch):
    """With XLA in cuDNN's place, which takes the same arguments."""
    asked, xla = [], jax.nn.dot_product_attention

    def flash(*args, implementation, **options):
        asked.append(implementation)
        return xla(*args, implementation="xla", **options)

    device = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax.nn, "dot_product_attention", flash)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, 3, 8)), jnp.bfloat16) for _ in range(3))
    mixed = attend_causally(q, k, v, window)
    want, _ = attend(*(x.astype(jnp.float32) for x in (q, k, v)), causal(0, 6, 0, 6, window))
    np.testing.assert_allclose(mixed.astype(jnp.float32), want, rtol=2**-6, atol=2**-6)
    assert asked == ["cudnn"]
    device.compute_capability = "7.5"  # which has none
    attend_causally(q, k, v, window)
    assert asked == ["cudnn"]
    device.compute_capability = "8.0"
    for other in (q[:, :5], q[..., :4], q.astype(jnp.float32)):  # what cuDNN does not take
        attend_causally(other, other, other, window)
    assert asked == ["cudnn"]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("relative", [False, True])
def test_attention_that_shows_its_weights_mixes_the_same(rng, window, relative):
    normal = nn.initializers.normal(0.5)
    attention = Attention(D, HEADS, not relative, normal, normal, relative=relative)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    where, _ = places((B, T), None, None, window, with_distances=relative)
    params = attention.init(jax.random.key(0), x, where)

    def mixed(params, shown):
        found = attention.apply(params, x, where, mutable=["intermediates"] if shown else False)
        return found[0][0] if shown else found[0]

    def with_gradient(shown):
        return jax.value_and_grad(lambda params: jnp.sum(jnp.sin(mixed(params, shown))))(params)

    np.testing.assert_allclose(mixed(params, False), mixed(params, True), rtol=1e-5, atol=1e-6)
    # as above: the true gradient of the key's bias is zero
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), with_gradient(False), with_gradient(True))


@pytest.mark.parametrize("window", [None, 3])
def test_tokens_one_by_one_attend_as_all_at_once(rng, window):
    """Mixed values, gradients and weights; position p is in slot p % slots, and a token's weights are by slot."""
    attention = Attention(D, HEADS, True, nn.initializers.normal(0.5), nn.initializers.normal(0.5))
    x, cotangent = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    params = attention.init(jax.random.key(0), x, places((B, T), None, None, window)[0])["params"]
    num_slots = window or T

    def attend_to(params, x, where, cache):
        (mixed, cache), sown = attention.apply({"params": params}, x, where, cache, mutable=["intermediates"])
        return mixed, cache, sown["intermediates"]["attention_weights"][0]

    def at_once(params, x):
        mixed, _, weights = attend_to(params, x, places((B, T), None, None, window)[0], None)
        return mixed, weights

    def one_by_one(params, x):
        slots, cache = empty_slots(B, num_slots), (jnp.zeros((B, HEADS, num_slots, D // HEADS)),) * 2
        found = []
        for t in range(T):
            where, slots = places((B, 1), None, slots, window)
            mixed, cache, weights = attend_to(params, x[:, t : t + 1], where, cache)
            found.append((mixed, weights))
        return tuple(jnp.concatenate(parts, axis) for parts, axis in zip(zip(*found, strict=True), (1, 2), strict=True))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients_of(function, params, x):
        mixed, backward, weights = jax.vjp(function, params, x, has_aux=True)
        return mixed, weights, backward(cotangent)

    (mixed, weights, gradients), (want, want_weights, want_gradients) = (
        gradients_of(function, params, x) for function in (one_by_one, at_once)
    )
    rounding = D * np.finfo(np.float32).eps * np.abs(want).max()  # one token's projections are one product, whose sums round anew
    np.testing.assert_allclose(mixed, want, rtol=0, atol=rounding)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), gradients, want_gradients)
    assert weights.shape == (B, HEADS, T, num_slots)
    for t in range(T):
        positions = np.arange(max(0, t + 1 - num_slots), t + 1)
        np.testing.assert_allclose(
            weights[:, :, t, positions % num_slots], want_weights[:, :, t, positions], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(weights[:, :, t].sum(axis=-1), 1, rtol=1e-6)


def even_attention(length):
    """Attention with dropout of half its weights, its parameters, and 6 texts: queries and keys are zero, so weights are even;
    values are one-hot, so what is mixed shows each weight by itself."""
    width = HEADS * length
    zero, one = {"kernel": np.zeros((width, width)), "bias": np.zeros(width)}, {"kernel": np.eye(width), "bias": np.zeros(width)}
    attention = Attention(width, HEADS, False, ZEROS, ZEROS, dropout_rate=0.5)
    params = {"query": zero, "key": zero, "value": one, "outward": one}
    return attention, params, np.tile(np.eye(length, dtype=np.float32), (6, 1, HEADS))


def test_dropout_masks_differ_over_rows_heads_and_tokens():
    rows, length = 6, 8
    attention, params, x = even_attention(length)
    where, _ = places((rows, length), None, None, None)

    def run(x, where, rows_B):
        mixed, _ = attention.apply({"params": params}, x, where, rows_B=rows_B, train=True, rngs={"dropout": jax.random.key(0)})
        return np.asarray(mixed).reshape(-1, length, HEADS, length).swapaxes(1, 2)  # [B, H, T, S], as the weights

    weights = run(x, where, None)
    even = np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]
    kept = weights != 0
    np.testing.assert_allclose(weights, np.where(kept, 2 * even, 0), rtol=1e-5)
    lower = np.tril(np.ones((length, length), bool))
    assert not kept[..., ~lower].any()
    share = kept[..., lower]
    assert abs(share.mean() - 0.5) < 5 * 0.5 / share.size**0.5
    assert len(np.unique(share.reshape(rows * HEADS, -1), axis=0)) == rows * HEADS  # a mask for each row and head
    assert len(np.unique(kept[:, :, -2:].reshape(-1, length), axis=0)) > 2 * rows  # and for each token
    alone = run(x[4:], jax.tree.map(lambda p: p[-1:] if p.shape[0] == rows else p, where), np.array([4, 5]))
    np.testing.assert_array_equal(alone, weights[4:])


def test_dropout_of_a_token_that_comes_alone_differs_over_rows_and_heads():
    length = 32
    attention, params, x = even_attention(length)
    cache = (jnp.zeros((6, HEADS, length, length)),) * 2
    where, slots = places((6, length - 1), None, empty_slots(6, length), None)
    _, cache = attention.apply({"params": params}, x[:, :-1], where, cache)

    @jax.jit
    def run(rows):
        where, _ = places((len(rows), 1), None, jax.tree.map(lambda leaf: leaf[rows], slots), None)
        options = {"rows_B": rows, "train": True, "rngs": {"dropout": jax.random.key(0)}}
        kept = jax.tree.map(lambda leaf: leaf[rows], cache)
        return attention.apply({"params": params}, jnp.asarray(x)[rows, -1:], where, kept, **options)[0].reshape(-1, length)

    weights = np.asarray(run(np.arange(6)))
    kept = weights != 0
    np.testing.assert_allclose(weights, np.where(kept, 2 / length, 0), rtol=1e-5)
    assert abs(kept.mean() - 0.5) < 5 * 0.5 / kept.size**0.5
    assert len(np.unique(kept, axis=0)) == 6 * HEADS
    np.testing.assert_array_equal(run(np.array([4, 5])), weights[4 * HEADS :])


def test_a_token_that_sees_nothing_gives_finite_numbers():
    values = np.arange(6, dtype=np.float32).reshape(1, 3, 1, 2)
    mixed, weights = attend(values, values, values, np.zeros((1, 3, 3), bool))
    np.testing.assert_allclose(mixed[0, :, 0], np.tile(values.mean(axis=1)[0], (3, 1)))
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


# --- who sees whom


class Oracle:
    """What a row's tokens may see, kept as a list of (document, position, identity) with no thought of caches or masks."""

    def __init__(self, window):
        self.window, self.document, self.seen = window, [], []

    def token(self, identity, starts_document):
        """Identities that the token sees, itself included, and its position."""
        if starts_document:
            self.document = []
        self.document.append(identity)
        return set(self.document[-self.window :] if self.window else self.document), len(self.document) - 1


@functools.cache
def compiled_places(window):
    return jax.jit(lambda segments, slots: places(segments.shape, segments, slots, window))


def keep(contents, slots_BT, identities):
    """What a layer writes into its cache."""
    for row, t in np.ndindex(identities.shape):
        if slots_BT[row, t] < contents.shape[1]:
            contents[row, slots_BT[row, t]] = identities[row, t]


@pytest.mark.parametrize(("window", "num_slots"), [(4, 4), (2, 2), (None, 16), (3, 16)])
def test_every_token_sees_exactly_what_it_may(window, num_slots):
    """Random documents and padding, in segments of 5 and of 1; a cached token is known by what was written to its slot."""
    rng = np.random.default_rng(7)
    rows, lengths = 6, [5, 1, 5, 5] if num_slots < 16 else [5, 1, 5, 1]
    slots, contents = empty_slots(rows, num_slots), np.full((rows, num_slots), -1)
    oracles = [Oracle(window) for _ in range(rows)]
    identity, seen_before, changes = 0, [False] * rows, 0
    for length in lengths:
        segments = rng.choice([0, 0, 1, 1, 1, 2], (rows, length)).astype(np.int32)
        segments[0], segments[1] = 1, rng.integers(0, 2, length)  # a row without padding, and one with a single document
        where, slots_after = compiled_places(window)(jnp.asarray(segments), slots)
        identities = np.arange(identity, identity + rows * length).reshape(rows, length)
        identity += rows * length
        if length == 1:  # written before it looks
            keep(contents, where.slots_BT, identities)
        keys = contents if length == 1 else np.concatenate([contents, identities], axis=1)
        for row in range(rows):
            previous = None
            for t in range(length):
                if segments[row, t] == 0:
                    continue
                starts = (
                    previous is not None and segments[row, t] != previous
                )  # a segment's first document goes on from the carry
                changes += starts
                previous = segments[row, t]
                expected, position = oracles[row].token(identities[row, t], starts)
                found = set(keys[row, np.asarray(where.visible_BTS)[row, t]])
                assert found == expected, (row, t)
                assert where.positions_BT[row, t] == position
                seen_before[row] = True
        keep(contents, where.slots_BT, identities)
        slots = slots_after
        for row in range(rows):
            np.testing.assert_array_equal(slots.next_B[row], len(oracles[row].document))
    assert all(seen_before) and changes > 5


def test_slots_by_hand():
    """Five tokens into a ring of three: the last three stay, position p in slot p % 3; then padding and one more."""
    where, slots = compiled_places(3)(jnp.ones((1, 5), jnp.int32), empty_slots(1, 3))
    np.testing.assert_array_equal(where.slots_BT, [[3, 3, 2, 0, 1]])  # 3: nowhere
    np.testing.assert_array_equal(slots.ordinal_BS, [[4, 5, 3]])
    np.testing.assert_array_equal(slots.next_B, [5])
    where, slots = compiled_places(3)(jnp.array([[0, 1]]), slots)
    np.testing.assert_array_equal(where.slots_BT, [[3, 2]])
    np.testing.assert_array_equal(slots.ordinal_BS, [[4, 5, 6]])
    np.testing.assert_array_equal(
        where.visible_BTS[0, 1], [True, True, False, False, True]
    )  # slot 2 held position 2, now too far
