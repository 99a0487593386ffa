"""One device = pmap over several = meshes: training with dropout, resets, uneven weights; rows and state there and back.

The eight devices are emulated, so they live in a process of their own, which this file is when it runs as a script:
it computes, once, what the tests then look at.
"""

import functools
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.parallel import Placement, Sharded, device_summary, join_rows, mesh_sizes, place, split_rows, state_specs

B, T, V, STEPS, LIMIT = 16, 5, 11, 3, 0.1
EXPERIMENTS = {
    "rnn": dict(dropout_rate=0.3, num_softmaxes=3, softmax_dropout_rate=0.3, init_scale=0.5),
    "gru": dict(dropout_rate=0.3, tie_embeddings=False, init_scale=0.5),
    "lstm": dict(
        dropout_rate=0.3,
        weight_drop_rate=0.3,
        state_dropout_rate=0.2,
        word_dropout_rate=0.2,
        variational_dropout=True,
        init_scale=0.5,
    ),
    "transformer": dict(dropout_rate=0.3, attention_window=4, num_heads=2, init_scale=0.3),
}
# path and shape of a piece of state -> the axes of a mesh of 2 × 2 × 2 that split each dimension
SPECS = {
    ("params/embedding/table", (12, 8)): ("tensor", "fsdp"),
    ("opt_state/1/0/mu/output/kernel", (8, 12)): ("fsdp", "tensor"),
    ("params/stack/layer_0/attention/outward/kernel", (8, 8)): ("tensor", "fsdp"),
    ("params/stack/layer_0/feed_forward/inward/kernel", (8, 32)): ("fsdp", "tensor"),
    ("params/stack/layer_3/recurrent_kernel", (8, 24)): ("fsdp", "tensor"),
    ("params/embedding/table", (11, 8)): (None, "tensor fsdp"),  # what does not divide moves to where it does
    ("params/embedding/table", (12, 7)): ("tensor fsdp", None),
    ("params/output/kernel", (6, 11)): ("tensor", None),
    ("params/output/bias", (12,)): ("tensor fsdp",),
    ("params/output/bias", (10,)): ("tensor",),
    ("params/output/bias", (11,)): (None,),
    ("step", ()): (),
}
MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8))


def placements(architecture):
    """Numbers of devices under pmap, and meshes; pmap is told apart by what is carried and by nothing else."""
    return (*MESHES, 4, 8) if architecture in ("lstm", "transformer") else MESHES


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """What this file, run as a script on eight emulated devices, has found."""
    path = tmp_path_factory.mktemp("devices") / "found.pickle"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PJRT_")}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment["PYTHONPATH"] = os.pathsep.join([str(pathlib.Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return pickle.loads(path.read_bytes())


# Devices add their parts of a gradient in another order than one device adds its rows. That is float32 rounding, at 6e-8 of
# terms of order one, and three steps let it grow a little; a mask, weight or reset that differs shows at 1e-2.
SAME = dict(rtol=0, atol=2e-6)


@pytest.mark.parametrize("architecture, devices", [(name, place) for name in EXPERIMENTS for place in placements(name)], ids=str)
def test_several_devices_equal_one(emulated, architecture, devices):
    """Four devices and the mesh of 2 × 2 × 2 take two micro-batches as well."""
    one, several = emulated[architecture][1], emulated[architecture][devices]
    for step in range(STEPS):
        for name, want in one["log_sums"][step].items():
            np.testing.assert_allclose(
                several["log_sums"][step][name], want, rtol=2e-6, atol=1e-6, err_msg=f"{name} of step {step + 1}"
            )
    for part in ("params", "carry"):
        assert jax.tree.structure(one[part]) == jax.tree.structure(several[part])
        jax.tree.map(functools.partial(np.testing.assert_allclose, **SAME), several[part], one[part])


@pytest.mark.parametrize("architecture", EXPERIMENTS)
def test_the_steps_compared_were_real_ones(emulated, architecture):
    """Parameters move, every step is clipped, weights are uneven, and dropout makes a difference."""
    found = emulated[architecture]
    last = found[1]["log_sums"][-1]
    assert last["steps"] == STEPS and last["clipped"] == STEPS and last["bad_step"] == 0
    np.testing.assert_allclose(last["update_norm"], LIMIT * STEPS, rtol=1e-5)  # at rate one
    np.testing.assert_allclose(last["weight"], found["weight"], rtol=1e-6)
    assert abs(found["loss without dropout"] - found[1]["log_sums"][0]["loss"]) > 0.1


@pytest.mark.parametrize("devices", [2, (2, 2, 2)], ids=str)
def test_a_carry_of_eight_devices_goes_on_elsewhere(emulated, devices):
    for name, want in emulated["lstm"]["one more step on 8"].items():
        found = emulated["lstm"][f"one more step on {devices}"][name]
        np.testing.assert_allclose(found, want, rtol=2e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("architecture", EXPERIMENTS)
def test_each_device_holds_its_share_of_the_state(emulated, architecture, mesh):
    """Of widths that divide. Of a vector that divides less often the rest is small."""
    whole, held, held_where_made, making = emulated[architecture]["bytes"][mesh]
    _, fsdp, tensor = mesh
    assert held_where_made == held and len(held) == 8
    if fsdp * tensor > 1:  # matrices that start orthogonal are decomposed on each device
        assert making < 0.7 * whole
    assert max(held) <= whole / (fsdp * tensor) * 1.05 and min(held) >= whole / (fsdp * tensor)


@pytest.mark.parametrize("name, shape", SPECS, ids=str)
def test_state_is_split_by_its_path_and_shape(name, shape):
    spec = state_specs({name: jax.ShapeDtypeStruct(shape, jnp.float32)}, mesh_sizes((2, 2, 2)))[name]
    assert tuple(" ".join(axes) if isinstance(axes, tuple) else axes for axes in spec) == SPECS[name, shape]


def test_a_run_goes_on_on_another_mesh_and_under_pmap(emulated):
    """Three steps on a mesh, three on another, three under pmap on two devices: as nine on one device."""
    whole, pieces, _ = emulated["runs"]
    assert [line["step"] for line in whole] == [line["step"] for line in pieces] and len(whole) >= 6
    for one, other in zip(whole, pieces, strict=True):
        assert one["split"] == other["split"]
        assert other["loss"] == pytest.approx(one["loss"], abs=2e-6), one["step"]


def test_a_mesh_scores_test_as_one_device_does(emulated):
    """In one row, which no mesh divides."""
    mesh, one = emulated["runs"][2]
    assert mesh == pytest.approx(one, abs=1e-6)


def test_no_device_of_a_mesh_holds_all_logits(emulated):
    """Of 80 tokens by 104 entries, rows split in two and the vocabulary in four, in the compiled loss and its gradient."""
    one, mesh = emulated["loss programs"]
    assert "f32[80,104]" in one and "f32[80,104]" not in mesh
    assert "f32[40,26]" in mesh and "f32[40,104]" not in mesh and "f32[80,26]" not in mesh


def test_a_vocabulary_that_does_not_divide_is_scored_in_blocks_as_on_one_device(emulated):
    one, mesh = emulated["scores"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), mesh, one)


def test_memory_of_a_step_is_told_before_it_is_taken(emulated):
    one, split = emulated["memory"][1], emulated["memory"][1, 8, 1]
    assert one["state"] > 0 and split["state"] == pytest.approx(one["state"] / 8, rel=0.05)
    assert split["state"] < split["peak"] < one["peak"]


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_what_goes_to_the_devices_comes_back(emulated, num_devices):
    sent, found = emulated["tree"], emulated["round trips"][num_devices]
    for name in ("state", "rows"):
        assert set(found[name]) == set(sent)
        for key, want in sent.items():
            if key == "scalar" and name == "rows":
                continue
            assert type(found[name][key]) is np.ndarray and found[name][key].dtype == want.dtype
            np.testing.assert_array_equal(found[name][key], want)
    assert found["nothing"] is None
    assert found["still"] == 7  # what came back is a copy: writing into it does not reach the device, nor the other way
    # device i holds rows i * B / n ... in order
    for i, rows in enumerate(found["shards"]):
        np.testing.assert_array_equal(np.ravel(rows), np.arange(B)[i * B // num_devices : (i + 1) * B // num_devices])


def test_rows_that_do_not_divide_name_a_number_that_does(emulated):
    for (num_devices, parts, rows), sentence in emulated["check_rows"].items():
        if rows % (num_devices * parts) == 0:
            assert sentence is None
            continue
        assert f"config.data.batch_size is {rows}, which {num_devices} devices" in sentence
        named = int(re.search(r"; (\d+) would work$", sentence)[1])
        assert named > 0 and named % (num_devices * parts) == 0
        assert abs(named - rows) <= num_devices * parts


def test_more_devices_than_there_are_is_one_clear_sentence(emulated):
    assert "config.num_devices is 9, but JAX sees 8 devices (cpu)" in emulated["too many"]
    assert "XLA_FLAGS=--xla_force_host_platform_device_count=9" in emulated["too many"]
    assert "config.mesh_shape's product is 16, but JAX sees 8 devices (cpu)" in emulated["too large a mesh"]


# --- on the one device of this process


def test_asking_for_two_of_one_device():
    with pytest.raises(UserError, match=r"config.num_devices is 2, but JAX sees 1 device \(cpu\); set it to at most that"):
        Placement(2)


def test_a_mesh_is_named_by_the_field_that_was_set(tiny):
    with pytest.raises(UserError, match="config.num_devices is 2, but JAX sees 1 device"):
        place(tiny("lstm", parallelism="sharded", num_devices=2))


def test_one_device_checks_micro_batches_too():
    placement = Placement(1)
    placement.check_rows(6, 3)
    with pytest.raises(UserError, match=r"batch_size is 7, which 1 devices × 3 micro-batches do not divide; 6 would work"):
        placement.check_rows(7, 3)
    assert device_summary(placement)["platform"] == "cpu" and device_summary(placement)["num_devices"] == 1


def test_a_compiled_function_is_compiled_once_for_each_shape():
    """In whatever order the shapes come; arguments whose shape is another than the last are still there to be reused."""
    traced = []

    def step(state, row):
        traced.append(jnp.shape(row))
        return ({"total": state["total"] + row.sum()},)

    compiled = Placement(1).compile(step, ("state",), donate=(0,))
    state, total = {"total": jnp.zeros(())}, 0.0
    for length in (3, 3, 5, 3, 5, 5, 3):
        (state,) = compiled(state, np.ones(length, np.float32))
        total += length
        assert float(state["total"]) == total
    assert traced == [(3,), (5,)]
    with pytest.raises(TypeError, match="unsupported operand"):
        Placement(1).compile(lambda x: (x + None,), ("state",))(jnp.zeros(()))


def test_splitting_rows_takes_turns_and_joining_restores_their_order():
    rows = {"a": np.arange(24).reshape(6, 4), "b": np.arange(6)}
    parts = split_rows(rows, 3)
    np.testing.assert_array_equal(parts["a"][1], rows["a"][[1, 4]])
    np.testing.assert_array_equal(parts["b"], [[0, 3], [1, 4], [2, 5]])
    for name, array in join_rows(parts).items():
        np.testing.assert_array_equal(array, rows[name])


# --- what runs on eight devices


def batches():
    """Four batches of uneven weights (rows that end early, one that never counts), with rows that are reset."""
    from lm.data.batches import Batch

    rng = np.random.default_rng(5)
    for _ in range(STEPS + 1):
        inputs, targets = (rng.integers(0, V, (B, T)).astype(np.int32) for _ in range(2))
        loss_weights = (rng.uniform(0, 2, (B, T)) * (np.arange(T) < rng.integers(1, T + 1, (B, 1)))).astype(np.float32)
        loss_weights[3] = 0
        yield Batch(inputs, targets, loss_weights, None, rng.random(B) < 0.3, np.arange(B, dtype=np.int32))


def train_everywhere(architecture, found):
    from lm.config import Config, resolve
    from lm.models.build import build, initialise
    from lm.objectives import causal_language_model, reset_rows
    from lm.training import optimizer as optimizers
    from lm.training.step import dropout_key, initial_state, train_step

    draft = Config()
    draft.model.architecture, draft.model.num_layers, draft.model.hidden_dim, draft.data.batch_size = architecture, 1, 8, B
    draft.optimizer.name, draft.optimizer.learning_rate, draft.optimizer.clip_norm = "sgd", 1.0, LIMIT
    for name, value in EXPERIMENTS[architecture].items():
        setattr(draft.model, name, value)
    config = resolve(draft)
    model = build(config, V)
    optimizer, _ = optimizers.build(config, steps_per_epoch=10)
    params = jax.jit(functools.partial(initialise, model))(0)
    # On the host: a step reuses the buffers of what it is given, and each placement is to start from the same numbers.
    start, carry = jax.device_get((initial_state(params, optimizer), model.initial_carry(B)))
    if architecture == "lstm":
        rng = np.random.default_rng(6)
        carry = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), carry)

    @functools.cache
    def compiled(devices, num_micro_batches):
        placement = Sharded(devices) if isinstance(devices, tuple) else Placement(devices)
        placement.check_rows(B, num_micro_batches)
        step = functools.partial(
            train_step,
            objective=causal_language_model(model),
            optimizer=optimizer,
            settings=config.optimizer,
            total=placement.total,
            dropout_key=dropout_key(config),
            num_micro_batches=num_micro_batches,
        )
        return placement, placement.compile(step, ("state", "rows"), donate=(0, 1))

    def run(devices, num_micro_batches, state, carry, rows):
        (placement, step), log_sums = compiled(devices, num_micro_batches), []
        state, carry = placement.put_state(state), placement.put_rows(carry)
        places = jax.tree.map(lambda leaf: leaf.sharding, (state, carry))
        for batch in rows:
            state, carry = step(state, carry, placement.put_rows(batch))
            log_sums.append(placement.get_state(state.log_sums))
        assert jax.tree.all(
            jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), (state, carry), places)
        )
        return placement.get_state(state), placement.get_rows(carry), log_sums

    *rows, last = batches()
    for devices in (1, *placements(architecture)):
        state, after, log_sums = run(devices, 2 if devices in (4, (2, 2, 2)) else 1, start, carry, rows)
        found[devices] = {"params": state.params, "carry": after, "log_sums": log_sums}
    if architecture == "lstm":
        for devices in (2, 8, (2, 2, 2)):
            found[f"one more step on {devices}"] = run(devices, 1, state, after, [last])[2][0]
    found["bytes"] = {mesh: bytes_held(config, mesh) for mesh in MESHES}
    found["weight"] = sum(batch.loss_weights_BT.sum() for batch in rows)
    plain = jax.jit(lambda params, carry, batch: causal_language_model(model)(params, carry, batch, None, False)[0])
    sums = plain(start.params, reset_rows(carry, rows[0].reset_B), rows[0])
    found["loss without dropout"] = float(sums["loss"])


def bytes_held(config, mesh):
    """Bytes of the state of a model whose widths divide; what each device holds of it where it was put and where it was made, and
    what one takes at most while it is made."""
    from lm.config import replaced
    from lm.models.build import build, initialise
    from lm.training import optimizer as optimizers
    from lm.training.step import initial_state

    config = replaced(config, "model", hidden_dim=16, mlp_dim=config.model.mlp_dim and 64)
    config = replaced(config, "optimizer", name="adamw", b1=0.9, b2=0.999)
    optimizer, _ = optimizers.build(config, steps_per_epoch=10)
    placement, found = Sharded(mesh), []

    def make():
        return initial_state(initialise(build(config, 64), 0), optimizer)

    state = jax.device_get(make())
    made = placement.make_state(make)
    for placed in (placement.put_state(state), made):
        held = dict.fromkeys(jax.devices(), 0)
        for leaf in jax.tree.leaves(placed):
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.nbytes
        found.append(list(held.values()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=0), jax.device_get(made), state)
    program = placement.compile(lambda: (make(),), ("state",)).lower().compile().memory_analysis()
    making = program.output_size_in_bytes + program.temp_size_in_bytes
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state)), *found, making


def runs(folder):
    """Metrics of nine steps on one device, and of as many on three placements, one after the other; and the loss of test that
    the first comes to on a mesh and on one device."""
    from helpers import changed, draft, write_corpus

    from lm.evaluation.evaluate import evaluate_run
    from lm.runs.folder import RunFolder
    from lm.runs.open import open_run
    from lm.training.train import train

    steps = dict(training__log_every_steps=1, training__evaluate_every_steps=3, evaluation__rows=2)
    config = draft(write_corpus(folder / "corpus"), "gru", model__dropout_rate=0.3, training__averaging="start", **steps)
    places = [
        dict(parallelism="sharded", num_devices=None, mesh_shape=(2, 2, 2)),
        dict(parallelism="sharded", num_devices=2, mesh_shape=None),
        dict(parallelism="pmap", num_devices=2, mesh_shape=None),
    ]
    for number, where in enumerate(places, 1):
        train(changed(config, training__num_steps=3 * number, **where), str(folder / "pieces"))
    train(changed(config, num_devices=1), str(folder / "whole"))
    scores = []
    for where in (places[0], dict(num_devices=1, parallelism="pmap", mesh_shape=None)):
        run = open_run(str(folder / "whole"))
        vars(run.config).update(where)
        scores.append(evaluate_run(run, "test")["loss"])
        shutil.rmtree(folder / "whole" / "evaluation")
    return [*(list(RunFolder(str(folder / name)).read_metrics()) for name in ("whole", "pieces")), scores]


def memory(folder):
    """What `step_memory` says of one device and of a mesh."""
    from helpers import changed, draft, write_corpus

    from lm.training.train import prepare, step_memory

    config = draft(write_corpus(folder / "corpus"), "lstm", model__hidden_dim=64, data__batch_size=8)
    found = {1: step_memory(prepare(config), Placement(1))}
    sharded = changed(config, parallelism="sharded", num_devices=None)
    return {**found, (1, 8, 1): step_memory(prepare(sharded), Sharded((1, 8, 1)))}


def loss_program(placement):
    """The compiled text of a loss and its gradient."""
    from lm.models.output import loss_sums

    def gradients(hidden_ND, matrix_DV, bias_V, targets_N):
        def loss(hidden_ND, matrix_DV):
            return loss_sums(hidden_ND, matrix_DV, bias_V, targets_N, jnp.ones(80), False, 0.1).objective

        return jax.grad(loss, argnums=(0, 1))(hidden_ND, matrix_DV)

    state = {"kernel": np.ones((8, 104), np.float32), "bias": np.ones(104, np.float32)}
    rows = placement.put_rows((np.ones((80, 8), np.float32), np.ones(80, np.int32)))
    kernel, bias = (placement.put_state(state)[name] for name in ("kernel", "bias"))
    return placement.compile(gradients, ("rows", "state")).lower(rows[0], kernel, bias, rows[1]).compile().as_text()


def scores(placement):
    """Of a vocabulary that four devices do not divide, in blocks of at most seven columns."""
    from lm.models import output

    rng = np.random.default_rng(1)
    state = {"kernel": rng.normal(size=(8, 101)).astype(np.float32), "bias": rng.normal(size=101).astype(np.float32)}
    rows = placement.put_rows((rng.normal(size=(40, 8)).astype(np.float32), rng.integers(0, 101, 40)))
    kernel, bias = (placement.put_state(state)[name] for name in ("kernel", "bias"))

    def score(hidden_ND, matrix_DV, bias_V, targets_N):
        return tuple(output.score_tokens(hidden_ND, matrix_DV, bias_V, targets_N, False))

    with mock.patch.multiple(output, logits_at_once=lambda: 40 * 7, _BLOCK=40 * 7, _NARROW=7):
        return placement.get_rows(placement.compile(score, ("rows",) * 3)(rows[0], kernel, bias, rows[1]))


def sentence_of(function, *arguments):
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return None


def compute():
    """Everything that the tests look at."""
    assert jax.device_count() == 8
    found = {"round trips": {}}
    for architecture in EXPERIMENTS:
        train_everywhere(architecture, found.setdefault(architecture, {}))
    rng = np.random.default_rng(0)
    tree = {
        "matrix": rng.normal(size=(B, 3, 2)).astype(np.float32),
        "whole": np.arange(B, dtype=np.int32),
        "flag": rng.random(B) < 0.5,
    }
    found["tree"] = {**tree, "scalar": np.asarray(2.5, np.float32)}
    for num_devices in (1, 2, 8):
        placement = Placement(num_devices)
        rows = placement.put_rows(tree)
        back = placement.get_rows(rows)
        back["whole"] += 1
        state = placement.put_state(found["tree"])
        copied = placement.get_state(placement.put_state({"a": np.full(3, 7)}))["a"]
        found["round trips"][num_devices] = {
            "state": placement.get_state(state),
            "rows": placement.get_rows(rows) | {"scalar": None},
            "nothing": placement.get_rows(placement.put_rows(None)),
            "shards": [np.asarray(shard.data) for shard in rows["whole"].addressable_shards],
            "still": int(copied[0]),
        }
    cases = [(n, parts, rows) for n in (2, 8) for parts in (1, 3) for rows in (1, 5, 12, 24, 47, 48, 100)]
    found["check_rows"] = {case: sentence_of(Placement(case[0]).check_rows, case[2], case[1]) for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        found["runs"] = runs(pathlib.Path(folder) / "runs")
        found["memory"] = memory(pathlib.Path(folder) / "memory")
    found["loss programs"] = [loss_program(placement) for placement in (Placement(1), Sharded((2, 1, 4)))]
    found["scores"] = [scores(placement) for placement in (Placement(1), Sharded((2, 1, 4)))]
    found["too large a mesh"] = sentence_of(Sharded, (2, 8, 1))
    found["too many"] = sentence_of(Placement, 9)
    return found


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_bytes(pickle.dumps(compute()))
