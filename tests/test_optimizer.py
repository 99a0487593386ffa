"""Every update rule against its formula in NumPy, decay of matrices alone, clipping, schedules at points worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.config import OptimizerConfig
from lm.data.batches import Windows
from lm.training import optimizer as optimizers

NAMES = OptimizerConfig.__dataclass_fields__["name"].metadata["choices"]
RATE = 0.01


def tree(rng, scale=1.0):
    """One parameter of each role, under the names of a model."""
    shapes = {
        "embedding": {"table": (5, 4)},
        "stack": {"layer_0": {"input_kernel": (4, 6), "bias": (6,)}, "last_norm": {"scale": (4,)}},
        "output": {"kernel": (4, 5), "bias": (5,)},
    }
    return jax.tree.map(
        lambda shape: rng.normal(0, scale, shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def build(tiny, name, **fields):
    fields = {"clip_norm": None, "learning_rate": RATE} | fields
    config = tiny("lstm", optimizer__name=name, **{f"optimizer__{field}": value for field, value in fields.items()})
    return optimizers.build(config, steps_per_epoch=10)[0]


def run(optimizer, params, gradients):
    """Parameters after an update with each of the gradients."""
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step, gradient in enumerate(gradients):
        updates, state = update(gradient, state, params, gradient_norm=optax.tree.norm(gradient), step=step)
        params = optax.apply_updates(params, updates)
    return params


def test_the_learning_rate_is_that_of_the_step_whatever_was_left_out(tiny):
    config = tiny("lstm", optimizer__name="sgd", optimizer__clip_norm=None, optimizer__schedule="step")
    optimizer, schedule = optimizers.build(config, steps_per_epoch=10)
    gradient = {"x": np.ones(3, np.float32)}
    for step in (0, 49, 73):  # each the first that the optimiser sees
        updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient, gradient_norm=1.0, step=step)
        np.testing.assert_array_equal(updates["x"], -np.float32(schedule(step)) * gradient["x"])
    assert schedule(73) < schedule(49) < schedule(0)


# --- the rules


def sgd(p, gradients):
    for g in gradients:
        p = p - RATE * g
    return p


def momentum(p, gradients, decay=0.9):
    velocity = 0
    for g in gradients:
        velocity = decay * velocity + g
        p = p - RATE * velocity
    return p


def rmsprop(p, gradients, decay=0.9):
    square = 0
    for g in gradients:
        square = decay * square + (1 - decay) * g**2
        p = p - RATE * g / np.sqrt(square + 1e-8)
    return p


def adam(p, gradients, b1=0.9, b2=0.999, rate=RATE):
    first = second = 0
    for t, g in enumerate(gradients, 1):
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
        p = p - rate * (first / (1 - b1**t)) / (np.sqrt(second / (1 - b2**t)) + 1e-8)
    return p


def lion(p, gradients, b1=0.9, b2=0.99):
    moment = 0
    for g in gradients:
        p = p - RATE * np.sign(b1 * moment + (1 - b1) * g)
        moment = b2 * moment + (1 - b2) * g
    return p


def adafactor(p, gradients):
    """Not factored, as every matrix here is small: the decay of the squares is 1 - t^-0.8, and the update's RMS at most 1."""
    square = 0
    for t, g in enumerate(gradients, 1):
        decay = 1 - t**-0.8
        square = decay * square + (1 - decay) * (g**2 + 1e-30)
        update = g / np.sqrt(square)
        p = p - RATE * update / max(1, np.sqrt(np.mean(update**2)))
    return p


@pytest.mark.parametrize(
    ("name", "rule", "changes"),
    [
        ("sgd", sgd, {}),
        ("momentum", momentum, {}),
        ("momentum", momentum, {"momentum": 0.5}),
        ("rmsprop", rmsprop, {}),
        ("adam", adam, {}),
        ("adam", adam, {"b1": 0.5, "b2": 0.7}),
        ("adamw", adam, {"weight_decay": 0.0}),
        ("lion", lion, {}),
        ("lion", lion, {"b1": 0.3, "b2": 0.6}),
        ("adafactor", adafactor, {}),
    ],
)
def test_three_updates_equal_the_formula(tiny, rng, name, rule, changes):
    params, gradients = tree(rng), [tree(rng, 0.2), tree(rng, 3.0), tree(rng, 0.1)]
    found = run(build(tiny, name, **changes), params, gradients)
    constants = {{"momentum": "decay"}.get(key, key): value for key, value in changes.items() if key != "weight_decay"}
    # At float32, parameters of order one lie 1e-7 apart.
    jax.tree.map(
        lambda f, p, *g: np.testing.assert_allclose(
            f, rule(p.astype(float), [x.astype(float) for x in g], **constants), rtol=0, atol=1e-6
        ),
        found,
        params,
        *gradients,
    )


def test_every_rule_is_in_a_table_here():
    assert {"sgd", "momentum", "rmsprop", "adam", "adamw", "lion", "adafactor", "muon"} == set(NAMES)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (16, 16)])
def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adam(tiny, rng, shape):
    """Singular values near one along the gradient's own singular vectors, times 0.2 sqrt(the longer side): Adam's size."""
    params = tree(rng)
    params["stack"]["layer_0"]["input_kernel"] = np.zeros(shape, np.float32)
    gradient = tree(rng)
    left, values, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    values = np.geomspace(1, 0.1, len(values))
    gradient["stack"]["layer_0"]["input_kernel"] = ((left * values) @ right).astype(np.float32)
    found = run(build(tiny, "muon"), params, [gradient])
    update = np.asarray(found["stack"]["layer_0"].pop("input_kernel"), np.float64) / (-RATE * 0.2 * math.sqrt(max(shape)))
    aligned = left.T @ update @ right.T
    np.testing.assert_allclose(aligned, np.diag(np.diag(aligned)), atol=1e-4)  # float32 through five cubic iterations
    # Jordan's coefficients trade exactness for speed: they bring singular values between 0.7 and 1.2.
    assert np.all((np.diag(aligned) > 0.65) & (np.diag(aligned) < 1.25))
    for trees in (params, gradient):
        trees["stack"]["layer_0"].pop("input_kernel")
    jax.tree.map(lambda f, p, g: np.testing.assert_allclose(f, adam(p, [g]), rtol=0, atol=1e-6), found, params, gradient)


@pytest.mark.parametrize("decay", [0.95, 0.5])
def test_muon_follows_its_velocity(tiny, rng, decay):
    """Jordan et al. 2024: five iterations of a X + b X X'X + c X X'X X'X from X = M / |M|, where M looks a step ahead of the mean
    of the gradients (as Nesterov does; both are corrected for their start at zero, as in Dozat 2016)."""
    params, gradients = tree(rng), [tree(rng, 0.2), tree(rng, 3.0), tree(rng, 0.1)]
    found = run(build(tiny, "muon", momentum=decay), params, gradients)["stack"]["layer_0"]["input_kernel"]
    p, mean = params["stack"]["layer_0"]["input_kernel"].astype(float), 0
    for t, gradient in enumerate(gradients, 1):
        g = gradient["stack"]["layer_0"]["input_kernel"].astype(float)
        mean = decay * mean + (1 - decay) * g
        x = decay * mean / (1 - decay ** (t + 1)) + (1 - decay) * g / (1 - decay**t)
        x = x / np.sqrt(np.sum(x**2))
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        p = p - RATE * 0.2 * math.sqrt(6) * x
    np.testing.assert_allclose(found, p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"b1": 0.5, "b2": 0.7, "adam_learning_rate": 0.07}])
def test_the_adam_beside_muon_has_settings_of_its_own(tiny, rng, changes):
    params, gradients = tree(rng), [tree(rng, 0.2), tree(rng, 3.0), tree(rng, 0.1)]
    found = run(build(tiny, "muon", **changes), params, gradients)
    constants = {"b2": 0.95, **{{"adam_learning_rate": "rate"}.get(key, key): value for key, value in changes.items()}}
    for trees in (found, params, *gradients):
        trees["stack"]["layer_0"].pop("input_kernel")
    jax.tree.map(
        lambda f, p, *g: np.testing.assert_allclose(f, adam(p, g, **constants), rtol=0, atol=1e-6), found, params, *gradients
    )


def test_adafactor_keeps_rows_and_columns_of_large_matrices_only(tiny, rng):
    params, gradient = tree(rng), tree(rng)
    for trees in (params, gradient):
        trees["stack"]["layer_0"]["input_kernel"] = rng.normal(size=(128, 130)).astype(np.float32)
    optimizer = build(tiny, "adafactor")
    largest = max(leaf.size for leaf in jax.tree.leaves(optimizer.init(params)))
    assert largest == 130
    g = gradient["stack"]["layer_0"]["input_kernel"].astype(float)
    rows, columns = np.mean(g**2, axis=1, keepdims=True), np.mean(g**2, axis=0, keepdims=True)
    update = g / np.sqrt(rows * columns / rows.mean())
    want = params["stack"]["layer_0"]["input_kernel"] - RATE * update / max(1, np.sqrt(np.mean(update**2)))
    found = run(optimizer, params, [gradient])["stack"]["layer_0"]["input_kernel"]
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)


# --- decay


@pytest.mark.parametrize("name", NAMES)
def test_decay_shrinks_matrices_and_nothing_else(tiny, rng, name):
    """With no gradient, a matrix shrinks by learning_rate * weight_decay a step; embedding, output, norm and biases stay."""
    params = tree(rng)
    zeros = jax.tree.map(np.zeros_like, params)
    found = run(build(tiny, name, weight_decay=2.0), params, [zeros] * 3)
    kernel = params["stack"]["layer_0"]["input_kernel"]
    np.testing.assert_allclose(found["stack"]["layer_0"]["input_kernel"], kernel * (1 - 2 * RATE) ** 3, rtol=1e-6)
    found["stack"]["layer_0"]["input_kernel"] = kernel
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_decay_of_all_shrinks_all(tiny, rng):
    params = tree(rng)
    found = run(build(tiny, "sgd", weight_decay=2.0, decayed="all"), params, [jax.tree.map(np.zeros_like, params)] * 3)
    jax.tree.map(lambda f, p: np.testing.assert_allclose(f, p * (1 - 2 * RATE) ** 3, rtol=1e-6), found, params)


def test_decay_is_apart_from_the_gradients_scale(tiny, rng):
    """Decoupled: Adam divides the gradient by its size, and must not divide the decay."""
    params, gradient = tree(rng), tree(rng, 100.0)
    plain, decayed = (run(build(tiny, "adamw", weight_decay=decay), params, [gradient]) for decay in (0.0, 2.0))
    kernel = params["stack"]["layer_0"]["input_kernel"]
    difference = plain["stack"]["layer_0"]["input_kernel"] - decayed["stack"]["layer_0"]["input_kernel"]
    np.testing.assert_allclose(difference, 2 * RATE * kernel, rtol=0, atol=3e-7)


# --- clipping


def test_a_clipped_gradient_has_the_norm_of_the_limit(tiny, rng):
    params, gradient = tree(rng), tree(rng, 5.0)
    norm = math.sqrt(sum(np.sum(leaf.astype(float) ** 2) for leaf in jax.tree.leaves(gradient)))
    found = run(build(tiny, "sgd", learning_rate=1.0, clip_norm=0.5), params, [gradient])
    jax.tree.map(lambda f, p, g: np.testing.assert_allclose(f, p - 0.5 / norm * g, rtol=0, atol=1e-6), found, params, gradient)
    unclipped = run(build(tiny, "sgd", learning_rate=1.0, clip_norm=2 * norm), params, [gradient])
    jax.tree.map(lambda f, p, g: np.testing.assert_allclose(f, p - g, rtol=0, atol=3e-6), unclipped, params, gradient)


@pytest.mark.parametrize("limit", [{"clip_norm": 0.5}, {"clip_value": 0.2}])
def test_clipping_comes_before_the_rule(limit, tiny, rng):
    """Behind Adam, whose steps are as long for a gradient of any size, it would do something else."""
    params, gradients = tree(rng), [tree(rng, scale) for scale in (0.01, 1.0, 0.1)]

    def clipped(gradient):
        norm = math.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(gradient)))
        if "clip_norm" in limit:
            return jax.tree.map(lambda g: np.float32(g * min(1, limit["clip_norm"] / norm)), gradient)
        return jax.tree.map(lambda g: np.clip(g, -limit["clip_value"], limit["clip_value"]), gradient)

    wanted, plain = (run(build(tiny, "adam"), params, given) for given in ([clipped(g) for g in gradients], gradients))
    found = run(build(tiny, "adam", **limit), params, gradients)
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=0, atol=1e-6), found, wanted)
    assert max(np.abs(f - p).max() for f, p in zip(*map(jax.tree.leaves, (found, plain)), strict=True)) > 1e-3


def test_clipping_by_value(tiny, rng):
    params, gradient = tree(rng), tree(rng)
    found = run(build(tiny, "sgd", learning_rate=1.0, clip_value=0.7), params, [gradient])
    jax.tree.map(
        lambda f, p, g: np.testing.assert_allclose(f, p - np.clip(g, -0.7, 0.7), rtol=0, atol=1e-6), found, params, gradient
    )


def test_is_clipped_says_whether_clipping_changes_the_gradient(tiny):
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[-4.0]])}
    norm = optax.tree.norm(gradients)
    for fields, expected in [
        ({"clip_norm": 4.9}, True),
        ({"clip_norm": 5.1}, False),
        ({"clip_norm": None}, False),
        ({"clip_norm": None, "clip_value": 3.9}, True),
        ({"clip_norm": None, "clip_value": 4.1}, False),
    ]:
        settings = tiny("lstm", **{f"optimizer__{name}": value for name, value in fields.items()}).optimizer
        assert bool(optimizers.is_clipped(settings, gradients, norm)) == expected, fields


# --- schedules


def rates(tiny, steps, steps_per_epoch=10, num_steps=100, **fields):
    config = tiny("lstm", training__num_steps=num_steps, **{f"optimizer__{name}": value for name, value in fields.items()})
    schedule = optimizers.learning_rate(config, steps_per_epoch)
    return [float(schedule(step)) for step in steps]


def test_warm_up_is_linear_and_begins_above_zero(tiny):
    found = rates(tiny, [0, 1, 2, 3, 4, 50, 99], learning_rate=2.0, warmup_steps=4)
    np.testing.assert_allclose(found, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0], rtol=1e-6)


def test_cosine_falls_to_its_final_fraction(tiny):
    fields = dict(learning_rate=3.0, schedule="cosine", warmup_steps=20, final_fraction=0.2)
    found = rates(tiny, [0, 19, 20, 40, 60, 80, 100, 1000], **fields)
    half, quarter = 3 * (0.2 + 0.8 / 2), 3 * (0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    three_quarters = 3 * (0.2 + 0.8 * (1 - math.cos(math.pi / 4)) / 2)
    np.testing.assert_allclose(found, [0.15, 3, 3, quarter, half, three_quarters, 0.6, 0.6], rtol=1e-6)
    np.testing.assert_allclose(rates(tiny, [100], learning_rate=3.0, schedule="cosine"), [0.3], rtol=1e-6)  # a tenth by default


def test_inverse_square_root(tiny):
    """Vaswani's curve, its peak at the last step of the warm-up; continuous there."""
    found = rates(tiny, [0, 7, 15, 16, 63, 255], learning_rate=1.0, schedule="inverse_sqrt", warmup_steps=16)
    np.testing.assert_allclose(found, [1 / 16, 8 / 16, 1, math.sqrt(16 / 17), 0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(rates(tiny, [0, 3, 99], learning_rate=1.0, schedule="inverse_sqrt"), [1, 0.5, 0.1], rtol=1e-6)


def test_steps_by_epoch_as_zaremba_did(tiny):
    """Four epochs at 1, then halved each epoch: the small model of the paper."""
    fields = dict(learning_rate=1.0, schedule="step", decay_start_epoch=4, decay_factor=0.5)
    found = rates(tiny, [0, 39, 40, 49, 50, 60, 125], num_steps=130, **fields)
    np.testing.assert_allclose(found, [1, 1, 0.5, 0.5, 0.25, 0.125, 2**-9], rtol=1e-6)


def test_steps_by_epoch_follow_the_sources_epochs(tiny):
    """An epoch of 8 windows in batches of 7 is 8/7 steps long; the rate must fall at the very step at which an epoch begins."""

    class Corpus:
        tokens, eos, name = np.zeros(8 * 2, np.int32), 0, "train"

    source = Windows(Corpus, batch_size=7, seq_len=2, seed=0)
    fields = dict(learning_rate=1.0, schedule="step", decay_start_epoch=1, decay_factor=0.5)
    found = rates(tiny, range(30), steps_per_epoch=source.steps_per_epoch, num_steps=30, **fields)
    np.testing.assert_allclose(found, [0.5 ** source.epoch(step) for step in range(30)], rtol=1e-6)


def test_plateau_leaves_the_factor_to_the_loop(tiny):
    np.testing.assert_allclose(rates(tiny, [0, 50], learning_rate=0.3, schedule="plateau"), [0.3, 0.3], rtol=1e-6)


def test_the_schedule_reaches_the_update(tiny):
    params = {"stack": {"layer_0": {"bias": np.zeros(1, np.float32)}}}
    gradient = {"stack": {"layer_0": {"bias": np.ones(1, np.float32)}}}
    optimizer = build(tiny, "sgd", learning_rate=1.0, warmup_steps=4)
    found = [run(optimizer, params, [gradient] * steps)["stack"]["layer_0"]["bias"][0] for steps in (1, 2, 3)]
    np.testing.assert_allclose(found, [-0.25, -0.75, -1.5], rtol=1e-6)
