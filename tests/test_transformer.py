"""The Transformer's stack against NumPy, forward and backward, and what must hold of its cache however a text is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import linen as nn

from lm.errors import UserError
from lm.models.transformer import TransformerStack

B, T, D, HEADS, F, LAYERS = 3, 12, 8, 2, 10, 2
ZEROS = nn.initializers.zeros  # parameters are always given


def stack_with(**fields):
    settings = dict(
        num_layers=LAYERS,
        model_dim=D,
        num_heads=HEADS,
        mlp_dim=F,
        activation="gelu",
        norm="layer_norm",
        positions="rotary",
        kernel_init=ZEROS,
        out_init=ZEROS,
        position_init=ZEROS,
    )
    return TransformerStack(**(settings | fields))


def random_params(stack):
    """Parameters of the stack's own structure, all random: kernels N(0, 0.4), scales about 1."""
    rng = np.random.default_rng(11)
    shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), jnp.zeros((1, 1, D))))["params"]

    def draw(path, leaf):
        return (rng.normal(0, 0.4, leaf.shape) + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes))


# --- against NumPy


def flat_attention(layer):
    """A layer's attention parameters (or gradients) under the reference's names."""
    names = {"query": "query", "key": "key", "value": "value", "outward": "out"}
    return {f"{theirs}_{kind}": layer[ours][kind] for ours, theirs in names.items() for kind in ("kernel", "bias")}


def flat_feed_forward(layer):
    names = {"inward": "in", "outward": "out", "gate": "gate"}
    return {f"{theirs}_{kind}": layer[ours][kind] for ours, theirs in names.items() if ours in layer for kind in layer[ours]}


def reference_stack(params, x, activation, norm, positions, window):
    """Pre-norm blocks of the reference's layers; returns hidden and backward(d_hidden) -> flat gradients by layer, d_x."""
    apply_norm = getattr(references, norm)
    length = x.shape[1]
    if positions == "learned":
        x = x + params["position_table"][:length]
    elif positions == "sinusoidal":
        turn = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(0, D, 2) / D)
        x = x + np.concatenate([np.sin(turn), np.cos(turn)], axis=1)
    tape, hidden = [], x
    for i in range(LAYERS):
        layer = params[f"layer_{i}"]
        inner, back_norm = apply_norm(layer["attention_norm"], hidden)
        mixed, _, back = references.attention(flat_attention(layer["attention"]), inner, HEADS, window, positions == "rotary")
        tape.append((f"layer_{i}/attention", back_norm, back))
        hidden = hidden + mixed
        inner, back_norm = apply_norm(layer["feed_forward_norm"], hidden)
        inner, back = references.feed_forward(flat_feed_forward(layer["feed_forward"]), inner, activation)
        tape.append((f"layer_{i}/feed_forward", back_norm, back))
        hidden = hidden + inner
    hidden, back_last = apply_norm(params["last_norm"], hidden)

    def backward(d_hidden):
        gradients = {}
        gradients["last_norm"], d_x = back_last(d_hidden)
        for name, back_norm, back in reversed(tape):
            gradients[name], d_inner = back(d_x)
            gradients[f"{name}_norm"], d_branch = back_norm(d_inner)
            d_x = d_x + d_branch
        if positions == "learned":
            gradients["position_table"] = np.zeros(params["position_table"].shape)
            gradients["position_table"][:length] = d_x.sum(axis=0)
        return gradients, d_x

    return hidden, backward


@pytest.mark.parametrize(
    ("activation", "norm", "positions", "window"),
    [
        ("gelu", "layer_norm", "rotary", None),
        ("swiglu", "rms_norm", "learned", 3),
        ("gelu_tanh", "layer_norm", "sinusoidal", None),
    ],
)
def test_stack_and_gradients_equal_numpy(rng, activation, norm, positions, window):
    max_positions = 9 if positions == "learned" else None
    stack = stack_with(
        activation=activation, norm=norm, positions=positions, attention_window=window, max_positions=max_positions
    )
    params = random_params(stack)
    x, cotangent = (rng.normal(size=(B, 6, D)).astype(np.float32) for _ in range(2))

    @jax.jit
    def run(params, x):
        hidden, backward = jax.vjp(lambda params, x: stack.apply({"params": params}, x)[0], params, x)
        return hidden, *backward(cotangent)

    hidden, d_params, d_x = run(params, x)
    want, backward = reference_stack(params, x, activation, norm, positions, window)
    want_params, want_x = backward(cotangent)
    # float32 through two layers with norms: a few hundred roundings, measured against the largest entry of each array
    close = functools.partial(np.testing.assert_allclose, rtol=0)
    close(hidden, want, atol=1e-5 * np.abs(want).max())
    close(d_x, want_x, atol=1e-5 * np.abs(want_x).max())
    found = {"last_norm": d_params["last_norm"]}
    for i in range(LAYERS):
        layer = d_params[f"layer_{i}"]
        found[f"layer_{i}/attention"] = flat_attention(layer["attention"])
        found[f"layer_{i}/feed_forward"] = flat_feed_forward(layer["feed_forward"])
        for part in ("attention_norm", "feed_forward_norm"):
            found[f"layer_{i}/{part}"] = layer[part]
    if positions == "learned":
        found["position_table"] = d_params["position_table"]
    assert jax.tree.structure(found) == jax.tree.structure(want_params)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want_params))
    jax.tree.map(lambda a, b: close(a, b, atol=2e-6 * largest), found, want_params)


# --- the cache


KINDS = {
    "rotary, ring of 5": dict(attention_window=5),
    "rotary, window shorter than a segment": dict(attention_window=2),
    "sinusoidal, all of the text": dict(positions="sinusoidal"),
    "learned, window": dict(positions="learned", max_positions=T, attention_window=7),
    "relative, ring of 5": dict(positions="relative", attention_window=5),
    "relative, all of the text, normed": dict(positions="relative", normed_queries=True, norm="rms_norm"),
}
# What one matmul adds in one order, several add in another, at values of order one through two layers: hence 1e-5.
SAME = dict(rtol=0, atol=1e-5)


@functools.cache
def compiled_stack(kind):
    stack = stack_with(**KINDS[kind])
    params = random_params(stack)
    run = jax.jit(lambda x, carry, segments: stack.apply({"params": params}, x, carry, segments_BT=segments))
    return stack, run


@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_of_a_text_equals_all_at_once(rng, kind):
    """Segments of 1, 3 and 4 tokens, and step by step; a window of 2 and of 5 makes the ring go round several times."""
    stack, run = compiled_stack(kind)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    hidden, nothing = run(x, None, None)
    assert nothing is None
    for lengths in ([1, 3, 4, 4], [1] * T):
        parts, carry, start = [], stack.initial_carry(B, T), 0
        for length in lengths:
            part, carry = run(x[:, start : start + length], carry, None)
            parts.append(part)
            start += length
        np.testing.assert_allclose(np.concatenate(parts, axis=1), hidden, **SAME)
        np.testing.assert_array_equal(carry["slots"].next_B, [T] * B)
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(carry))  # axis 0 of every leaf is the row


def test_a_token_sees_exactly_its_window(rng):
    """Window 2 in two layers: the third token back cannot matter, the second one does."""
    _, run = compiled_stack("rotary, window shorter than a segment")
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    changed = x.copy()
    changed[:, 4] += 1
    difference = np.any(np.asarray(run(x, None, None)[0] != run(changed, None, None)[0]), axis=(0, 2))
    np.testing.assert_array_equal(difference, np.isin(np.arange(T), [4, 5, 6]))


def padded_segments(rng, x):
    """Each row's text spread over three segments of 8 with padding left, right, between or everywhere; it holds noise."""
    plan = [
        ["00011110", "11110000", "00001111"],
        ["11110000", "00000000", "10101111"],
        ["00000001", "01101011", "11111100"],
    ]
    noise = rng.normal(0, 100, (B, 3, 8, D)).astype(np.float32)
    segments = np.array([[list(map(int, part)) for part in row] for row in plan], np.int32)
    for row in range(B):
        noise[row][segments[row] > 0] = x[row, : segments[row].sum()]
    return noise.swapaxes(0, 1), segments.swapaxes(0, 1)


@pytest.mark.parametrize("kind", ["rotary, ring of 5", "learned, window"])
def test_padding_anywhere_changes_nothing(rng, kind):
    stack, run = compiled_stack(kind)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    hidden = np.asarray(run(x, None, None)[0])
    first, second = (padded_segments(np.random.default_rng(seed), x) for seed in (1, 2))
    segments = first[1]
    results = []
    for parts in (first[0], second[0]):
        carry, valid = stack.initial_carry(B, T), [[] for _ in range(B)]
        for part, segment in zip(parts, segments, strict=True):
            found, after = run(part, carry, segment)
            assert np.all(np.isfinite(found))
            for row in range(B):
                valid[row].append(np.asarray(found)[row, segment[row] > 0])
                if not segment[row].any():
                    jax.tree.map(lambda a, b, row=row: np.testing.assert_array_equal(a[row], b[row]), after, carry)
            carry = after
        results.append(([np.concatenate(parts) for parts in valid], carry))
    for row in range(B):
        np.testing.assert_allclose(results[0][0][row], hidden[row, : segments[:, row].sum()], **SAME)
    jax.tree.map(np.testing.assert_array_equal, *results)  # what padding holds cannot matter at all


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_each_document_alone(rng, kind):
    """Also with a text carried in, which belongs to the first document, and carried out, which the last one leaves."""
    stack, run = compiled_stack(kind)
    segments = np.array([[1, 1, 2, 2, 2, 0, 3, 3], [4, 0, 4, 4, 0, 4, 4, 4], [0, 6, 5, 5, 5, 5, 0, 0]], np.int32)
    before, x, later = (rng.normal(size=(B, length, D)).astype(np.float32) for length in (3, 8, 1))
    _, carry = run(before, stack.initial_carry(B, T), None)
    hidden, carry = run(x, carry, segments)
    last, _ = run(later, carry, None)
    for row, documents in enumerate([[1, 2, 3], [4], [6, 5]]):
        for number, document in enumerate(documents):
            where = segments[row] == document
            text = [before[row]] * (number == 0) + [x[row, where]] + [later[row]] * (number == len(documents) - 1)
            alone = np.zeros((B, T, D), np.float32)  # one shape, so that one compiled function does; the rest is never seen
            alone[0, : sum(map(len, text))] = np.concatenate(text)
            start = 3 * (number == 0)
            want = np.asarray(run(alone, None, None)[0])[0, start : start + where.sum() + 1]
            np.testing.assert_allclose(hidden[row, where], want[: where.sum()], **SAME)
            if number == len(documents) - 1:
                np.testing.assert_allclose(last[row, 0], want[-1], **SAME)


def test_rotary_is_the_same_a_million_tokens_on(rng):
    """Only distances count: a carry at position 1,000,003 gives what one at 3 gives."""
    stack, run = compiled_stack("rotary, ring of 5")
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    carry = stack.initial_carry(B, None)
    far = {**carry, "slots": carry["slots"].replace(next_B=jnp.full(B, 1_000_000, jnp.int32))}
    hidden = [run(x[:, 4:8], run(x[:, :4], start, None)[1], None)[0] for start in (carry, far)]
    np.testing.assert_allclose(hidden[1], hidden[0], **SAME)


# --- limits


def test_learned_positions_cannot_be_carried_past_their_table():
    stack = stack_with(positions="learned", max_positions=10, attention_window=4)
    assert stack.initial_carry(3, 10)["cache_0"][0].shape == (3, HEADS, 4, D // HEADS)
    with pytest.raises(
        UserError, match=r"learned positions end at model.max_positions 10, so 11 tokens cannot be carried; .*context"
    ):
        stack.initial_carry(3, 11)
    with pytest.raises(UserError, match="a stream without end cannot be carried"):
        stack.initial_carry(3, None)
    with pytest.raises(UserError, match="a text of 11 tokens is longer than model.max_positions 10"):
        jax.eval_shape(lambda: stack.init(jax.random.key(0), jnp.zeros((1, 11, D))))


def test_a_cache_without_end_needs_a_window():
    with pytest.raises(UserError, match="model.attention_window.*as long as the text; set it, or score in windows"):
        stack_with().initial_carry(1, None)
    assert stack_with().initial_carry(1, 6)["slots"].ordinal_BS.shape == (1, 6)


# --- what can be looked at, and dropout


def test_attention_weights_can_be_had(rng):
    stack = stack_with(attention_window=5)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    _, sown = jax.jit(lambda x: stack.apply({"params": random_params(stack)}, x, mutable=["intermediates"]))(x)
    scanned = stack_with(attention_window=5, scan_layers=True)
    _, same = jax.jit(lambda x: scanned.apply({"params": random_params(stack)}, x, mutable=["intermediates"]))(x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), same, sown)
    for i in range(LAYERS):
        (weights,) = sown["intermediates"][f"layer_{i}"]["attention"]["attention_weights"]
        assert weights.shape == (B, HEADS, T, T)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
        assert not np.triu(weights, 1).any() and not np.tril(weights, -5).any()


RATES = {"embedding_dropout_rate": 0.3, "dropout_rate": 0.3, "attention_dropout_rate": 0.3}


@functools.cache
def dropped_stack(variational):
    """(x, rows) -> hidden, and gradients of a sum of it to x and the parameters of the one layer, with every dropout on."""
    stack = stack_with(num_layers=1, variational=variational, **RATES)
    params = random_params(stack)

    @jax.jit
    def run(x, rows_B):
        def total(x, params):
            rngs = {"dropout": jax.random.key(5)}
            hidden, _ = stack.apply({"params": params}, x, rows_B=rows_B, train=True, rngs=rngs)
            return jnp.sum(jnp.sin(hidden)), hidden

        return jax.grad(total, argnums=(0, 1), has_aux=True)(x, params)

    return run


@pytest.mark.parametrize("variational", [False, True])
def test_dropout_depends_on_the_global_row_only(rng, variational):
    x = rng.normal(size=(8, T, D)).astype(np.float32)
    (d_x, _), hidden = dropped_stack(variational)(x, np.arange(8))
    (d_x_alone, _), alone = dropped_stack(variational)(x[4:], np.arange(4, 8))
    np.testing.assert_allclose(alone, hidden[4:], **SAME)
    np.testing.assert_array_equal(np.asarray(d_x_alone) == 0, np.asarray(d_x[4:]) == 0)
    dropped = np.asarray(d_x) == 0  # of the embedding
    assert (dropped == dropped[:, :1]).all() == variational
    independent = dropped[:, 0] if variational else dropped
    assert abs(dropped.mean() - 0.3) < 5 * (0.3 * 0.7 / independent.size) ** 0.5
    assert len(np.unique(dropped, axis=0)) == 8


@pytest.mark.parametrize("variational", [False, True])
def test_dropout_of_branches_is_constant_over_time_where_variational(rng, variational):
    """With one row, an entry of a branch that is dropped at every token leaves a column of its last matrix without gradient."""
    x = rng.normal(size=(1, T, D)).astype(np.float32)
    columns = []
    for row in range(16):
        (_, d_params), _ = dropped_stack(variational)(x, np.array([row]))
        layer = d_params["layer_0"]
        kernels = layer["attention"]["outward"]["kernel"], layer["feed_forward"]["outward"]["kernel"]
        columns.append(np.concatenate([np.all(np.asarray(kernel) == 0, axis=0) for kernel in kernels]))
    dropped = np.stack(columns)
    assert abs(dropped.mean() - 0.3) < 5 * (0.3 * 0.7 / dropped.size) ** 0.5 if variational else not dropped.any()
    assert not variational or not np.array_equal(dropped[:, :D], dropped[:, D:])


def test_dropout_is_off_outside_training(rng):
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    stack = stack_with(attention_window=5, **RATES)
    params = random_params(stack)
    _, run = compiled_stack("rotary, ring of 5")
    hidden, _ = jax.jit(lambda x: stack.apply({"params": params}, x, train=False))(x)
    np.testing.assert_array_equal(hidden, run(x, None, None)[0])


@pytest.mark.parametrize(
    "fields, carried",
    [
        (dict(scan_layers=True), False),
        (dict(remat="full"), False),
        (dict(scan_layers=True, remat="matmuls"), False),
        (dict(scan_layers=True, remat="full"), False),
        (dict(scan_layers=True, remat="full"), True),
    ],
)
def test_layers_scanned_or_made_again_give_the_same_numbers(rng, fields, carried):
    """Every dropout on: a layer's masks are its own, however the layers are run; also where a cache is carried."""
    x, cotangent = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    fields = fields | dict(attention_window=5) if carried else fields

    def gradients_of(stack):
        def forward(params, x):
            options = dict(train=True, rngs={"dropout": jax.random.key(3)})
            carry = stack.apply({"params": params}, -x, stack.initial_carry(B, None), **options)[1] if carried else None
            hidden, _ = stack.apply({"params": params}, x, carry, **options)
            return hidden

        def run(params):
            hidden, backward = jax.vjp(forward, params, x)
            return hidden, *backward(cotangent)

        return jax.jit(run)(random_params(stack_with()))

    window = fields.get("attention_window")
    plain, other = gradients_of(stack_with(**RATES, attention_window=window)), gradients_of(stack_with(**RATES, **fields))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), other, plain)
    masks_off = gradients_of(stack_with(**fields))
    assert np.abs(masks_off[0] - plain[0]).max() > 0.1
    stack = stack_with(**RATES, **fields)
    assert jax.tree.structure(random_params(stack)) == jax.tree.structure(random_params(stack_with()))


@pytest.mark.parametrize("carried", [False, True])
def test_a_scanned_stack_is_one_layers_program_and_keeps_less_where_it_is_made_again(carried):
    """Lines of the program do not grow with depth; what the backward pass keeps falls from policy to policy."""

    def compiled(**fields):
        stack = stack_with(attention_window=16, **fields)
        shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), jnp.zeros((1, 1, D))))
        carry = jax.eval_shape(lambda: stack.initial_carry(4, None)) if carried else None

        def loss(variables, x, carry):
            return stack.apply(variables, x, carry, train=True)[0].sum()

        return jax.jit(jax.grad(loss)).lower(shapes, jax.ShapeDtypeStruct((4, 64, D), jnp.float32), carry)

    deep, shallow = (len(compiled(num_layers=n, scan_layers=True).as_text()) for n in (12, 3))
    assert deep < 1.5 * shallow < len(compiled(num_layers=12).as_text()) / 2
    kept = [
        compiled(num_layers=12, scan_layers=True, remat=remat).compile().memory_analysis().temp_size_in_bytes
        for remat in ("none", "matmuls", "full")
    ]
    assert kept[0] > 1.5 * kept[1] > 1.5 * 1.2 * kept[2], kept
