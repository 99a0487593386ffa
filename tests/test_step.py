"""The training step: first loss, exact weights, micro-batches, clipping, logs, resets, and what must not break it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import NEURAL
from lm.data.batches import Batch
from lm.models.build import build, initialise
from lm.objectives import causal_language_model
from lm.parallel import Placement
from lm.training import optimizer as optimizers
from lm.training.controls import decide, initial_controls
from lm.training.progress import Progress
from lm.training.step import dropout_key, evaluation_params, initial_state, joined, parted, train_step
from lm.training.train import compile_step

B, T, V = 4, 5, 11
EVERY_DROPOUT = {
    "model__dropout_rate": 0.3,
    "model__word_dropout_rate": 0.2,
    "model__weight_drop_rate": 0.3,
    "model__variational_dropout": True,
    "model__num_softmaxes": 2,
    "model__softmax_dropout_rate": 0.3,
}
# SGD at rate one without clipping: the change of the parameters is the gradient itself.
PLAIN = {"optimizer__name": "sgd", "optimizer__learning_rate": 1.0, "optimizer__clip_norm": None}


def bigrams(params, carry, batch, key, train):
    """The smallest objective that is like a real one: a table of logits by the token before. Compiles at once."""
    log_prob = jax.nn.log_softmax(params["stack"]["kernel"][batch.inputs_BT] + params["output"]["bias"][None, None])
    loss = -jnp.sum(jnp.take_along_axis(log_prob, batch.targets_BT[..., None], axis=-1)[..., 0] * batch.loss_weights_BT)
    return {"objective": loss, "loss": loss, "weight": jnp.sum(batch.loss_weights_BT)}, carry


def compiled_step(config, objective, full_weight=None):
    """The optimiser and the step for a config, on one device."""
    optimizer, _ = optimizers.build(config, steps_per_epoch=10)
    step = functools.partial(
        train_step,
        objective=objective,
        optimizer=optimizer,
        settings=config.optimizer,
        total=lambda tree: tree,
        dropout_key=dropout_key(config),
        num_micro_batches=config.training.num_micro_batches,
        on_bad_step=config.training.on_bad_step,
        spike_nats=config.training.spike_nats,
        averaging_decay=config.training.averaging_decay,
        full_weight=full_weight,
    )
    return optimizer, jax.jit(step)


@pytest.fixture(scope="module")
def lstm(tiny, random_params):
    """(fields) -> model, state with random parameters, step."""

    @functools.cache
    def make(**fields):
        config = tiny("lstm", **(PLAIN | fields))
        model = build(config, V)
        optimizer, step = compiled_step(config, causal_language_model(model))
        return model, initial_state(random_params(model), optimizer), step

    return make


@pytest.fixture(scope="module")
def bigram(tiny):
    """(fields) -> state with random parameters, step."""
    rng = np.random.default_rng(8)
    params = {"stack": {"kernel": rng.normal(size=(V, V))}, "output": {"bias": rng.normal(size=V)}}
    params = jax.tree.map(jnp.float32, params)

    @functools.cache
    def make(**fields):
        config = tiny("lstm", **(PLAIN | fields))
        optimizer, step = compiled_step(config, bigrams)
        return initial_state(params, optimizer, config.training), step

    return make


@pytest.fixture
def batch(rng):
    inputs, targets = (rng.integers(0, V, (B, T)).astype(np.int32) for _ in range(2))
    loss_weights = rng.uniform(0, 2, (B, T)).astype(np.float32)
    loss_weights[1, 2:], loss_weights[3] = 0, 0  # uneven: a row that ends early, and one that does not count
    return Batch(inputs, targets, loss_weights, None, np.zeros(B, bool), np.arange(B, dtype=np.int32))


def random_carry(rng, model):
    return jax.tree.map(lambda leaf: rng.normal(0, 0.7, leaf.shape).astype(np.float32), model.initial_carry(B))


def gradient_of(before, after):
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before.params, after.params)


def norm(tree):
    return math.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize("architecture", NEURAL)
def test_the_first_loss_is_that_of_guessing(tiny, batch, architecture):
    """Fresh parameters know nothing: ln V nats per token, however the model is made."""
    model = build(tiny(architecture), V)

    @jax.jit
    def loss():
        sums, _ = causal_language_model(model)(initialise(model, 0), None, batch, jax.random.key(0), False)
        return sums["loss"] / sums["weight"]

    assert abs(loss() - math.log(V)) < 0.05


def test_the_gradient_is_that_of_the_weighted_mean_to_the_last_row(lstm, rng, batch):
    """By hand: each row by itself in a batch of one, sums added up, divided by all weights once."""
    model, state, step = lstm()
    carry = random_carry(rng, model)
    after, _ = step(state, carry, batch)

    @jax.jit
    def of_row(params, carry, row):
        def total(params):
            hidden, _ = model.apply({"params": params}, row.inputs_BT, carry)
            logits = model.apply({"params": params}, hidden, method="logits")
            log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), row.targets_BT[..., None], axis=-1)[..., 0]
            return -jnp.sum(log_prob * row.loss_weights_BT)

        return jax.value_and_grad(total)(params)

    losses, gradients = zip(
        *[of_row(state.params, *jax.tree.map(lambda x, i=i: x[i : i + 1], (carry, batch))) for i in range(B)], strict=True
    )
    weight = batch.loss_weights_BT.sum()
    want = jax.tree.map(lambda *rows: np.sum(rows, axis=0) / weight, *gradients)
    # Parameters of order one lie 1e-7 apart, and so does their difference; sums of a few dozen terms add as much again.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), gradient_of(state, after), want)
    np.testing.assert_allclose(after.log_sums["loss"], np.sum(losses), rtol=1e-6)
    np.testing.assert_allclose(after.log_sums["weight"], weight, rtol=1e-6)
    np.testing.assert_allclose(after.log_sums["gradient_norm"], norm(want), rtol=1e-5)
    np.testing.assert_allclose(after.log_sums["update_norm"], norm(want), rtol=1e-5)
    assert (int(after.step), int(after.log_sums["steps"]), int(after.log_sums["clipped"])) == (1, 1, 0)


def test_two_half_batches_equal_one_batch(lstm, rng, batch):
    """With every dropout on, uneven weights, a carry and a reset: masks are keyed by row, and sums are divided once."""
    model, state, whole = lstm(**EVERY_DROPOUT)
    _, _, in_parts = lstm(**EVERY_DROPOUT, training__num_micro_batches=2)
    batch = batch.replace(reset_B=np.array([False, True, False, False]))
    carry = random_carry(rng, model)
    results = [step(*step(state, carry, batch), batch) for step in (whole, in_parts)]
    # Adding the rows' gradients in another order: float32 rounding of entries below one.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), results[1], results[0])


def test_dropout_differs_from_step_to_step_and_is_a_function_of_seed_and_step(lstm, rng, batch):
    model, state, step = lstm(**EVERY_DROPOUT)
    carry = random_carry(rng, model)
    first, again = (step(state, carry, batch)[0] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    later = step(state.replace(step=state.step + 1), carry, batch)[0]
    assert first.log_sums["loss"] != later.log_sums["loss"]
    losses = [first.log_sums["loss"]]
    for fields in (dict(seed=1), dict(dropout_generator="rbg"), dict(dropout_generator="rbg", seed=1)):
        _, _, other = lstm(**EVERY_DROPOUT, **fields)
        losses.append(other(state, carry, batch)[0].log_sums["loss"])
        assert other(state, carry, batch)[0].log_sums["loss"] == losses[-1]
    assert len(set(map(float, losses))) == 4


def test_clipping_to_a_norm_counts_and_limits_the_update(bigram, batch):
    state, plain = bigram()
    _, clipped = bigram(optimizer__clip_norm=0.05)
    whole, after = plain(state, None, batch)[0], clipped(state, None, batch)[0]
    gradient, update = gradient_of(state, whole), gradient_of(state, after)
    assert norm(gradient) > 0.2
    np.testing.assert_allclose(norm(update), 0.05, rtol=1e-5)
    np.testing.assert_allclose(after.log_sums["update_norm"], 0.05, rtol=1e-6)
    np.testing.assert_allclose(after.log_sums["gradient_norm"], norm(gradient), rtol=1e-5)  # before clipping
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, g * 0.05 / norm(gradient), rtol=0, atol=3e-7), update, gradient)
    assert (int(after.log_sums["clipped"]), int(whole.log_sums["clipped"])) == (1, 0)
    twice = clipped(clipped(after, None, batch)[0], None, batch.replace(loss_weights_BT=np.zeros((B, T), np.float32)))[0]
    assert (int(twice.log_sums["clipped"]), int(twice.log_sums["steps"])) == (2, 3)  # the third had nothing to clip


def test_clipping_by_value_limits_each_entry(bigram, batch):
    state, plain = bigram()
    _, clipped = bigram(optimizer__clip_value=0.01)
    gradient, update = (gradient_of(state, step(state, None, batch)[0]) for step in (plain, clipped))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 0.02
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, np.clip(g, -0.01, 0.01), rtol=0, atol=3e-7), update, gradient)


def test_the_loops_factor_scales_the_update(bigram, batch):
    state, step = bigram()
    whole = gradient_of(state, step(state, None, batch)[0])
    slowed = state.replace(controls={"learning_rate_scale": jnp.float32(0.25)})
    after, _ = step(slowed, None, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 4, rtol=0, atol=3e-7), gradient_of(slowed, after), whole)
    np.testing.assert_allclose(after.log_sums["update_norm"], norm(whole) / 4, rtol=1e-5)


def test_an_update_counts_as_much_as_its_batch_is_full(tiny, bigram, batch):
    """The gradient of a step is a mean over its tokens; the update is that times the share of a full batch there is."""
    state, plain = bigram()
    config = tiny("lstm", **PLAIN)
    _, scaled = compiled_step(config, bigrams, full_weight=40.0)
    share = batch.loss_weights_BT.sum() / 40
    assert 0.1 < share < 0.9
    whole, part = (gradient_of(state, step(state, None, batch)[0]) for step in (plain, scaled))
    jax.tree.map(lambda p, w: np.testing.assert_allclose(p, w * share, rtol=0, atol=3e-7), part, whole)


@pytest.mark.parametrize("decay", [None, 0.6])
def test_averaged_parameters_are_the_mean_since_averaging_began(bigram, batch, decay):
    """Until then they are those of the last step; a step that is left out is in no mean."""
    state, step = bigram(training__averaging="stall", training__averaging_decay=decay, training__on_bad_step="skip")
    jax.tree.map(np.testing.assert_array_equal, evaluation_params(state), state.params)
    bad = batch.replace(loss_weights_BT=np.full((B, T), np.nan, np.float32))
    history, mean = [], None
    for number in range(9):
        if number == 3:
            state = state.replace(controls={**state.controls, "averaging": jnp.int32(1)})
        state, _ = step(state, None, bad if number == 6 else batch)
        kernel = np.asarray(state.params["stack"]["kernel"], np.float64)
        if number < 3:
            wanted = kernel
        elif number != 6:
            history.append(kernel)
            if decay is None:
                wanted = np.mean(history, axis=0)
            else:
                past = 0.0 if len(history) == 1 else max(min(decay, 1 - 1 / len(history)), 0)
                wanted = mean = kernel if mean is None else past * mean + (1 - past) * kernel
        np.testing.assert_allclose(evaluation_params(state)["stack"]["kernel"], wanted, rtol=0, atol=1e-6)
    assert int(state.averaged_steps) == len(history) == 5
    assert np.abs(state.params["stack"]["kernel"] - wanted).max() > 0.01


def test_a_state_is_parted_and_joined_again(bigram):
    for averaging in (None, "start"):
        state, _ = bigram(training__averaging=averaging)
        params, rest = parted(state)
        jax.tree.map(np.testing.assert_array_equal, params, evaluation_params(state))
        again = joined(params, rest)
        assert jax.tree.structure(again) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, again, state)


def test_averaging_begins_when_valid_has_stalled_and_never_ends(tiny):
    """Algorithm 1 of Merity et al. 2017: after a look worse than the best of those more than n looks ago."""
    config = tiny("lstm", training__averaging="stall", training__averaging_patience=2)
    losses = [5.0, 4.0, 4.5, 4.4, 4.6, 3.9, 3.8]
    progress, controls, begun = Progress(), initial_controls("stall"), []
    for step, loss in enumerate(losses):
        progress.looked(step, loss)
        controls = decide(config, controls, progress)
        worse = step > 2 and loss > min(losses[: step - 2])
        begun.append(int(controls["averaging"]))
        assert begun[-1] == (1 if worse else begun[-2] if step else 0)
    assert begun == [0, 0, 0, 0, 1, 1, 1]  # 4.6 > 4.0, of three looks before; 4.4 had 5.0 alone so far back
    assert int(initial_controls("start")["averaging"]) == 1 and "averaging" not in initial_controls(None)


def test_the_first_step_with_a_loss_that_is_not_finite_is_named(bigram, batch):
    state, step = bigram()
    bad = batch.replace(loss_weights_BT=np.full((B, T), np.nan, np.float32))
    named = []
    for rows in (batch, batch, bad, batch):
        state, _ = step(state, None, rows)
        named.append(int(state.log_sums["bad_step"]))
    assert named == [0, 0, 3, 3]


def test_a_gradient_that_is_not_finite_is_named_though_the_loss_is(tiny, batch):
    def square_root(params, carry, batch, key, train):
        value = jnp.sqrt(params["stack"]["kernel"])  # 0 at 0, where its slope is infinite
        return {"objective": value, "loss": value, "weight": jnp.float32(1)}, carry

    optimizer, step = compiled_step(tiny("lstm", **PLAIN), square_root)
    for start, named in ((0.25, 0), (0.0, 1)):
        state, _ = step(initial_state({"stack": {"kernel": jnp.float32(start)}}, optimizer), None, batch)
        assert float(state.log_sums["loss"]) == math.sqrt(start) and int(state.log_sums["bad_step"]) == named


def test_a_bad_step_is_left_out_where_that_is_asked_for(bigram, batch):
    """All but the count of steps is as if it had not been; what had been good before and after counts alone."""
    bad = batch.replace(loss_weights_BT=np.full((B, T), np.nan, np.float32), reset_B=np.array([True, False, False, False]))
    for fields in ({}, {"optimizer__name": "adam", "training__num_micro_batches": 2}):
        state, step = bigram(training__on_bad_step="skip", **fields)
        carry = np.ones((B, 3), np.float32)
        before, carry = step(state, carry, batch)
        after, found = step(before, carry, bad)
        for part in ("params", "opt_state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
        expected = {**before.log_sums, "skipped_steps": 1}
        assert {name: float(value) for name, value in after.log_sums.items()} == {n: float(v) for n, v in expected.items()}
        assert int(after.step) == 2 and int(after.log_sums["steps"]) == 1
        np.testing.assert_array_equal(
            found, carry * np.array([[0], [1], [1], [1]])
        )  # the next batch does not see the text before

        plain, plain_step = bigram(**fields)
        want, _ = plain_step(plain_step(plain, carry, batch)[0].replace(step=jnp.int32(2)), carry, batch)
        last, _ = step(after, carry, batch)
        jax.tree.map(np.testing.assert_array_equal, last.params, want.params)


def test_a_loss_far_above_the_recent_mean_is_a_bad_step(bigram, batch):
    """Once the mean has had time; the mean itself does not follow a spike."""
    state, step = bigram(training__spike_nats=1.0, training__on_bad_step="skip", optimizer__learning_rate=1e-3)
    unlikely = jnp.argmin(state.params["stack"]["kernel"] + state.params["output"]["bias"], axis=1)
    spike = batch.replace(targets_BT=np.asarray(unlikely)[batch.inputs_BT])
    early, _ = step(state, None, spike)
    assert int(early.log_sums["skipped_steps"]) == 0
    losses, other = [], batch.replace(targets_BT=np.roll(batch.targets_BT, 1, axis=1))  # so that the mean has something to mean
    for number in range(60):
        before = float(state.log_sums["loss"])
        if number in (49, 50):
            assert int(step(state, None, spike)[0].log_sums["skipped_steps"]) == (number == 50)
        state, _ = step(state, None, other if number % 3 else batch)
        losses.append((float(state.log_sums["loss"]) - before) / batch.loss_weights_BT.sum())
    assert int(state.log_sums["skipped_steps"]) == 0 and abs(losses[1] - losses[0]) > 0.01
    mean = 0.0
    for number, loss in enumerate(losses, 1):
        mean += max(0.02, 1 / number) * (loss - mean)
    assert float(state.recent_loss) == pytest.approx(mean, abs=1e-5)
    after, _ = step(state, None, spike)
    assert int(after.log_sums["skipped_steps"]) == 1 and float(after.recent_loss) == float(state.recent_loss)
    assert int(step(after, None, batch)[0].log_sums["skipped_steps"]) == 1


def test_the_recent_mean_begins_with_the_first_step_that_was_good(bigram, batch):
    state, step = bigram(training__spike_nats=1.0, training__on_bad_step="skip", optimizer__learning_rate=1e-3)
    for _ in range(3):
        state, _ = step(state, None, batch.replace(loss_weights_BT=np.full((B, T), np.nan, np.float32)))
    assert int(state.log_sums["skipped_steps"]) == 3 and float(state.recent_loss) == 0
    state, _ = step(state, None, batch)
    assert float(state.recent_loss) == pytest.approx(float(state.log_sums["loss"]) / batch.loss_weights_BT.sum(), rel=1e-6)


def test_sums_go_on_from_step_to_step(bigram, batch):
    state, step = bigram()
    one, _ = step(state, None, batch)
    two, _ = step(one, None, batch)
    alone, _ = step(one.replace(log_sums=state.log_sums), None, batch)
    for name in ("loss", "weight", "gradient_norm", "update_norm", "steps"):
        np.testing.assert_allclose(two.log_sums[name], one.log_sums[name] + alone.log_sums[name], rtol=1e-6)
    assert int(two.log_sums["steps"]) == 2 and int(two.step) == 2


@pytest.mark.parametrize("name", ["sgd", "adam", "muon"])
def test_a_batch_that_does_not_count_breaks_nothing(bigram, batch, name):
    state, step = bigram(optimizer__name=name)
    after, _ = step(state, None, batch.replace(loss_weights_BT=np.zeros((B, T), np.float32)))
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    assert float(after.log_sums["weight"]) == 0 and int(after.log_sums["bad_step"]) == 0
    assert int(after.step) == 1


def test_reset_empties_exactly_the_named_rows_before_the_step(lstm, rng, batch):
    model, state, step = lstm()
    carry, empty = random_carry(rng, model), model.initial_carry(B)
    reset = np.array([False, True, False, True])
    _, kept = step(state, carry, batch)
    _, fresh = step(state, empty, batch)
    _, found = step(state, carry, batch.replace(reset_B=reset))
    for a, b, c in zip(*map(jax.tree.leaves, (found, kept, fresh)), strict=True):
        np.testing.assert_allclose(a, np.where(reset[:, None], c, b), rtol=0, atol=1e-6)
        assert not np.allclose(b, c)
    assert step(state, None, batch)[1] is None


def test_a_step_over_a_vocabulary_of_256_thousand_needs_less_than_a_gibibyte_beside_its_state(tiny):
    """By the compiler's count, at 8 × 1024 tokens and width 512, tied: the gradient of the table alone is half of that."""
    fields = dict(model__num_layers=1, model__hidden_dim=512, data__batch_size=8, data__seq_len=1024, data__order="windows")
    config = tiny("gru", **fields, optimizer__name="sgd")
    model = build(config, 256_000)
    optimizer, _ = optimizers.build(config, 10)
    state = jax.eval_shape(lambda: initial_state(initialise(model, 0), optimizer))
    rows = {name: jax.ShapeDtypeStruct((8, 1024), dtype) for name, dtype in (("inputs_BT", "int32"), ("targets_BT", "int32"))}
    weights = jax.ShapeDtypeStruct((8, 1024), "float32")
    shapes = Batch(**rows, loss_weights_BT=weights, segments_BT=None, reset_B=np.zeros(8, bool), rows_B=np.arange(8))
    compiled = compile_step(config, model, optimizer, Placement(1)).lower(state, None, shapes).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 500 * 2**20  # the state is updated in place
    assert memory.temp_size_in_bytes < 2**30
