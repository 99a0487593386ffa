"""Several processes train one model: as one does with as many devices, and when one of them is stopped, killed or refuses."""

import contextlib
import functools
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import ROOT, changed, config_file, draft, without_timings, write_corpus

from launch import hosts
from lm.errors import UserError
from lm.runs.checkpoint import Checkpoints
from lm.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("compilations_shared")

# Sums over processes add in another order than sums within one, and some steps let the rounding grow. A row that is read
# twice, a mask or a reset that differs shows at 1e-2.
SAME = dict(rtol=0, atol=5e-6)
RUNS = {
    "lstm": dict(
        model__dropout_rate=0.3,
        model__weight_drop_rate=0.2,
        model__variational_dropout=True,
        optimizer__learning_rate=0.05,
        optimizer__schedule="plateau",
    ),
    "transformer": dict(
        model__dropout_rate=0.2,
        optimizer__name="adamw",
        optimizer__learning_rate=0.01,
        parallelism="sharded",
        mesh_shape=(1, 2, 2),
        training__num_micro_batches=2,
    ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), train=40, valid=9, test=8)


def config_of(corpus, architecture, **fields):
    values = dict(
        data__batch_size=8,
        evaluation__rows=3,  # filled up to a multiple of the devices
        num_devices=None,
        training__num_steps=6,
        training__log_every_steps=3,
        training__evaluate_every_steps=3,
        training__checkpoint_every_steps=2,
    )
    return changed(draft(corpus, architecture), **(values | RUNS[architecture] | fields))


@contextlib.contextmanager
def job(config_path, workdir, num_processes, num_devices):
    """Starts a job of several processes, each with so many emulated devices; what still runs at the end is killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "launch.train", f"--config={config_path}", f"--workdir={workdir}"]
    if num_processes > 1:
        command += [f"--coordinator_address=localhost:{port}", f"--num_processes={num_processes}"]
    emulated = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": emulated}
    started = [
        subprocess.Popen(
            [*command, *([f"--process_id={index}"] if num_processes > 1 else [])],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for index in range(num_processes)
    ]
    try:
        yield started
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ends(processes, timeout=300):
    """Exit code, output and errors of each, when all have ended."""
    told = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


def outcome(workdir):
    """The final parameters, and metrics without timings."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    lines = [without_timings(line) for line in RunFolder(workdir).read_metrics()]
    return checkpoints.params(checkpoints.latest_sound()), lines


def assert_same(found, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **SAME), found[0], expected[0])
    assert len(found[1]) == len(expected[1])
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours.pop("split") == theirs["split"]
        assert ours == pytest.approx({name: value for name, value in theirs.items() if name != "split"}, rel=1e-4)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """What each run comes to in one process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for architecture in RUNS:
        path = config_file(folder / f"{architecture}.py", config_of(corpus, architecture))
        with job(path, folder / architecture, 1, 4) as processes:
            [(code, _, err)] = ends(processes)
        assert code == 0, err
        found[architecture] = outcome(folder / architecture)
    return found


def test_two_processes_stopped_by_sigterm_to_one_and_taken_up_again_equal_one(corpus, alone, tmp_path):
    path = config_file(tmp_path / "config.py", config_of(corpus, "lstm"))
    with job(path, tmp_path / "run", 2, 2) as processes:
        processes[0].stdout.readline()  # training has begun: the first step is compiled
        processes[1].send_signal(signal.SIGTERM)
        (code, _, err), other = ends(processes)
    assert code == 143 and other == (143, "", "")
    [step] = re.findall(r"stopped by SIGTERM after step (\d+), which is saved; the same command goes on there", err)
    assert 1 <= int(step) == Checkpoints(tmp_path / "run" / "checkpoints").latest_sound() < 6
    with job(path, tmp_path / "run", 2, 2) as processes:
        (code, out, err), other = ends(processes)
    assert code == 0 and f"going on from step {step}" in out and "trained" in out, err
    assert other == (0, "", "")
    assert_same(outcome(tmp_path / "run"), alone["lstm"])


def test_one_process_goes_on_from_what_two_have_saved(corpus, alone, tmp_path):
    """Of a mesh, of which each process saves its part."""
    path = config_file(tmp_path / "config.py", config_of(corpus, "transformer", training__num_steps=3))
    with job(path, tmp_path / "run", 2, 2) as processes:
        assert [code for code, _, _ in ends(processes)] == [0, 0]
    longer = config_file(tmp_path / "longer.py", config_of(corpus, "transformer"))
    with job(longer, tmp_path / "run", 1, 4) as processes:
        [(code, _, err)] = ends(processes)
        assert code == 0, err
    assert_same(outcome(tmp_path / "run"), alone["transformer"])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others_within_a_minute(corpus, tmp_path, victim):
    """The first with its guard, so that nothing is heard of it again; of the second only the child that trains."""
    path = config_file(tmp_path / "config.py", config_of(corpus, "lstm", training__num_steps=1_000_000))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    with job(path, tmp_path / "run", 2, 2) as processes:
        while len(checkpoints.steps()) < 2:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        if victim == 0:
            os.killpg(processes[0].pid, signal.SIGKILL)
        else:
            subprocess.run(["pkill", "-KILL", "-P", str(processes[1].pid)], check=True)
        killed = time.monotonic()
        found = ends(processes, timeout=60)
        assert time.monotonic() - killed < 60
    survivor = found[1 - victim]
    how = {0: "is lost: it has given no sign of life for 20 s", 1: "was killed by SIGKILL"}[victim]
    assert survivor[0] == 1
    assert survivor[2] == (
        f"launch.train: process {victim} of 2 (host {platform.node()}) {how}; the same command, also on another number of hosts, "
        "goes on from the last checkpoint\n"
    )
    if victim == 0:
        with job(path, tmp_path / "run", 1, 2) as [process]:
            process.stdout.readline()
            assert process.stdout.readline() == f"going on from step {checkpoints.latest_sound()}\n"


@pytest.mark.parametrize(
    "architecture, fields, sentence",
    [
        ("lstm", dict(data__batch_size=6), "config.data.batch_size is 6, which 4 devices do not divide"),
        ("lstm", dict(num_devices=2), "config.num_devices is 2, but the 2 processes have 4 devices"),
        ("ngram", {}, "an n-gram is counted by one process"),
    ],
)
def test_what_several_processes_refuse(corpus, tmp_path, architecture, fields, sentence):
    config = config_of(corpus, architecture, **fields) if architecture in RUNS else draft(corpus, architecture)
    with job(config_file(tmp_path / "config.py", config), tmp_path / "run", 2, 2) as processes:
        for code, _, err in ends(processes):
            assert code == 1 and f"launch.train: {sentence}" in err


def test_what_is_wrong_in_one_process_is_told_by_all(corpus, tmp_path):
    """Only the first process takes the lock."""
    path = config_file(tmp_path / "config.py", config_of(corpus, "lstm"))
    with RunFolder(tmp_path / "run").locked(), job(path, tmp_path / "run", 2, 2) as processes:
        for code, _, err in ends(processes):
            assert code == 1 and err.startswith(f"launch.train: --workdir {tmp_path / 'run'} is in use by another run")


def test_processes_of_different_texts_or_configs_do_not_begin(corpus, tmp_path):
    """Each has files of its own; a word of train and the learning rate differ, and no size or shape does."""
    other = shutil.copytree(corpus, tmp_path / "other")
    text = (other / "train.txt").read_text()
    (other / "train.txt").write_text(text[::-1])
    path = config_file(tmp_path / "config.py", config_of(corpus, "lstm"))
    path.write_text(
        path.read_text().replace("get_config", "one_config")
        + "\n\ndef get_config():\n    import sys\n\n    config = one_config()\n"
        + f"    if '--process_id=1' in sys.argv:\n        config.data.path = {str(other)!r}\n"
        + "        config.optimizer.learning_rate *= 2\n    return config\n"
    )
    with job(path, tmp_path / "run", 2, 2) as processes:
        for code, _, err in ends(processes):
            assert code == 1 and "do not have the same text and config.optimizer.learning_rate: give all of them" in err
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("node1:99", 2, None), "--process_id is missing"),
        ((None, None, 0), "--coordinator_address is missing"),
        (("node1:99", 2, 2), "--process_id=2 must lie between 0 and --num_processes=2 less one"),
        (("node1", 2, 0), "--coordinator_address=node1 must be HOST:PORT"),
        (("9876", 2, 0), "--coordinator_address=9876 must be HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_each_other(flags, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        hosts.is_one_of_many(*flags)


@pytest.mark.parametrize(
    "environment, many",
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # in a batch script, outside srun
        ({"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_NODELIST": "node1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2"}, False),
        ({"TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_a_scheduler_tells_of_other_processes(monkeypatch, environment, many):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TPU_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts.is_one_of_many(None, None, None) is many
