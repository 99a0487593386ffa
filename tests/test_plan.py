"""lm.benchmark.plan against programs compiled for emulated devices, and against sums by hand.

The devices are emulated, so this file is also the script of a process of its own, which compiles and reads the programs.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from collectives import sent_bytes
from helpers import ROOT, call_verbs, refused

from launch.command import load_config
from lm.benchmark.plan import MACHINES, Machine, plan, plans
from lm.config import Config, resolve
from lm.data.batches import Batch
from lm.models.build import build, initialise
from lm.parallel import place
from lm.training import optimizer as optimizers
from lm.training.step import initial_state
from lm.training.train import compile_step

V, B, T, D = 256, 16, 32, 64
MODELS = {
    "transformer": dict(architecture="transformer", num_heads=4),
    "remat": dict(
        architecture="transformer",
        num_heads=4,
        num_layers=3,
        remat="full",
        activation="swiglu",
        mlp_dim=192,
        tie_embeddings=False,
    ),
    "lstm": dict(architecture="lstm"),
    "gru": dict(architecture="gru", tie_embeddings=False),
}
CASES = [
    ("transformer", (4, 1, 1)),
    ("transformer", (1, 4, 1)),
    ("transformer", (1, 1, 4)),
    ("transformer", (2, 2, 2)),
    ("remat", (1, 4, 1)),
    ("remat", (1, 2, 4)),
    ("lstm", (2, 2, 2)),
    ("lstm", (1, 1, 4)),
    ("gru", (1, 4, 1)),
]
EMULATED = Machine("emulated", flops={"float32": 1e11, "bfloat16": 2e11}, memory=2**40, link=1e10, merges=False, narrow=False)


def config_of(model, mesh_shape, compute_dtype="float32"):
    config = Config()
    config.model.num_layers, config.model.hidden_dim = 2, D
    for name, value in MODELS[model].items():
        setattr(config.model, name, value)
    if config.model.architecture == "transformer":
        config.data.order = "windows"
    config.data.batch_size, config.data.seq_len = B, T
    config.optimizer.name, config.compute_dtype = "adamw", compute_dtype
    config.parallelism, config.mesh_shape = "sharded", mesh_shape
    return resolve(config)


def compiled(model, mesh_shape):
    """What the compiler says of a step: bytes sent, of state, and in use at once."""
    config = config_of(model, mesh_shape)
    model, placement = build(config, V), place(config)
    optimizer, _ = optimizers.build(config, 1)
    like = placement.state_like(jax.eval_shape(lambda: initial_state(initialise(model, 0), optimizer, config.training)))
    tokens_BT = np.zeros((B, T), np.int32)
    batch = Batch(tokens_BT, tokens_BT, np.ones((B, T), np.float32), None, np.zeros(B, bool), np.arange(B, dtype=np.int32))
    carry = jax.device_get(model.initial_carry(B)) if config.data.order == "stream" else None
    step = compile_step(config, model, optimizer, placement)
    program = step.lower(like, placement.put_rows(carry), placement.put_rows(batch)).compile()
    memory = program.memory_analysis()
    outside = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return sent_bytes(program.as_text()), placement.state_bytes(like), outside + memory.temp_size_in_bytes


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("number, model, mesh_shape", [(number, *case) for number, case in enumerate(CASES)], ids=str)
def test_a_plan_is_what_the_compiler_makes_of_it(programs, number, model, mesh_shape):
    """What is sent to 3 %; where two axes split what is made again, the compiler gathers hidden states more often, by a tenth."""
    sent, state, peak = programs[number]
    planned = plan(config_of(model, mesh_shape), V, mesh_shape, EMULATED)
    assert planned.state_bytes == state
    assert planned.sent_bytes == pytest.approx(sent, rel=0.1 if (model, mesh_shape) == ("remat", (1, 2, 4)) else 0.03)
    assert planned.memory_bytes == pytest.approx(peak, rel=0.3)


def test_by_hand():
    """Data parallelism sends twice the gradients, whatever they are split into, but for (n - 1) / n."""
    config = config_of("transformer", (4, 1, 1))
    planned = plan(config, V, (4, 1, 1), EMULATED)
    shapes = jax.eval_shape(lambda: initialise(build(config, V), 0))
    num_params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    twice = V * D  # a tied table has two gradients, of look-up and output
    assert planned.sent_bytes == 2 * 4 * (num_params + twice) * 3 / 4
    assert plan(config, V, (1, 1, 1), EMULATED).sent_bytes == 0
    assert planned.sending_seconds == planned.sent_bytes / EMULATED.link
    per_token = 3 * (2 * (2 * 12 * D * D + V * D) + 4 * 2 * D * (T + 1) / 2)  # forward and twice backward
    assert planned.compute_seconds == pytest.approx(per_token * B * T / (4 * EMULATED.flops["float32"] / 2))
    half = plan(config_of("transformer", (4, 1, 1), "bfloat16"), V, (4, 1, 1), EMULATED)
    assert half.compute_seconds == planned.compute_seconds / 2
    assert planned.share == planned.sending_seconds / (planned.sending_seconds + planned.compute_seconds)


def test_what_the_cpu_does_not_spare():
    config = config_of("transformer", (1, 4, 1), "bfloat16")
    on_cpu, on_gpu = (plan(config, V, (1, 4, 1), machine) for machine in (EMULATED, MACHINES["h100"]))
    sent = [{part.what: part.num_bytes for part in found.sent} for found in (on_cpu, on_gpu)]
    assert sent[0]["matrices"] == 2 * sent[1]["matrices"]  # in half precision
    assert sent[0]["gradients of the matrices"] == 4 * sent[1]["gradients of the matrices"]  # and only the parts that are kept
    assert sent[0]["gradient of the table"] == sent[1]["gradient of the table"]  # in float32, summed


def test_bandwidths():
    h100, v5p = MACHINES["h100"], MACHINES["v5p"]
    assert h100.bandwidth((1, 1, 8), ("tensor",)) == 450e9
    assert h100.bandwidth((4, 8, 1), ("fsdp",)) == 450e9  # within a node
    assert h100.bandwidth((4, 8, 1), ("data",)) == 50e9  # each to its like in other nodes
    assert h100.bandwidth((1, 16, 1), ("fsdp",)) == 400e9  # all eight of a node at once
    assert h100.bandwidth((4, 4, 4), ("fsdp",)) == 100e9  # two of them
    assert h100.bandwidth((4, 4, 4), ("data", "fsdp")) == 100e9
    assert v5p.bandwidth((1, 64, 1), ("fsdp",)) == 600e9
    assert v5p.bandwidth((2, 8, 4), ("fsdp",)) == 200e9
    assert v5p.bandwidth((1, 8, 4), ("fsdp",)) == 400e9 and v5p.bandwidth((1, 8, 4), ("tensor",)) == 200e9
    assert v5p.bandwidth((2, 8, 1), ("data", "fsdp")) == 600e9


def test_the_fastest_of_what_fits_comes_first():
    config = resolve(load_config(str(ROOT / "configs/scale/10b.py"), ["--config.model.num_layers=3"]))
    small = dataclasses.replace(MACHINES["h100"], memory=16e9)
    found = plans(config, 32_768, 64, small)
    seconds = [one.compute_seconds + one.sending_seconds for one in found]
    assert seconds == sorted(seconds) and len({one.mesh_shape for one in found}) == len(found) > 5
    assert all(math.prod(one.mesh_shape) == 64 and one.memory_bytes < 0.9 * 16e9 for one in found)
    assert (64, 1, 1) not in {one.mesh_shape for one in found}  # the state alone is more than a device has
    with refused("no mesh of 7 devices divides"):
        plans(config, 32_768, 7, MACHINES["h100"])
    with refused("on 2 devices a step takes", "nine tenths of the 15 GiB of H100 SXM;", "take more devices"):
        plans(config, 32_768, 2, small)
    with refused("takes neither config.model.remat=matmuls"):
        plan(resolve(load_config(str(ROOT / "configs/scale/1b.py"), ["--config.model.remat=matmuls"])), 32_768, (1, 8, 1), small)
    for file in ("compare/unigram", "compare/kneser_ney_5"):
        with refused("takes no config.model.architecture=ngram; it takes rnn, gru, lstm, transformer"):
            plan(resolve(load_config(str(ROOT / f"configs/{file}.py"), [])), 1_000, (1, 8, 1), small)
    projected = ["--config.model.project_output=True", "--config.model.embed_dim=16"]
    with refused("takes no config.model.project_output"):
        plan(resolve(load_config(str(ROOT / "configs/compare/lstm.py"), projected)), 1_000, (1, 8, 1), small)


def test_the_verb(tmp_path):
    named = ["launch.plan", f"--config={ROOT / 'configs/scale/1b.py'}:runlocal=1"]
    calls = [
        [*named, "--device=v5p", "--num_devices=4", f"--json={tmp_path / 'plan.json'}"],
        [*named, "--config.parallelism=sharded", "--config.mesh_shape=(1,4,2)"],
        [*named, "--config.data.tokenizer=byte", "--config.data.vocab_size=none", "--config.num_devices=4"],
        [*named, "--config.data.tokenizer=word", "--config.data.vocab_size=none"],
        [*named, "--num_devices=8", "--config.num_devices=4"],
        ["launch.plan"],
        [*named, "--num_devices=4", "--config.parallelism=sharded", "--config.mesh_shape=(1,4,2)"],
        [*named, "--config.parallelism=sharded", "--config.mesh_shape=(1,3,1)"],
    ]
    good, one_mesh, of_bytes, *bad = call_verbs(calls, tmp_path / "calls")
    assert one_mesh.code == 0 and "8 × H100" in one_mesh.out and one_mesh.out.count("| 1 × 4 × 2 |") == 1, one_mesh.err
    assert of_bytes.code == 0 and "4 × H100" in of_bytes.out, of_bytes.err
    assert one_mesh.out.count(" × 2 |") == 1  # of meshes
    assert good.code == 0 and "4 × TPU v5p" in good.out and "per device on the first mesh" in good.out, good.err
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["plans"][0]["mesh_shape"] and written["device"] == "TPU v5p"
    sentences = (
        "--vocab_size",
        "config.num_devices takes 4; leave one",
        "--config is missing",
        "takes 8; leave one",
        "mesh_shape (1, 3, 1) does not divide",
    )
    for done, sentence in zip(bad, sentences, strict=True):
        assert done.code == 1 and sentence in done.err and "Traceback" not in done.err


if __name__ == "__main__":
    print(json.dumps([compiled(*case) for case in CASES]))
