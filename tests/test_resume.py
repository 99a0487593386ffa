"""Training to the end: broken off anywhere, by whatever, a run ends bit for bit as if it had not been; and when it ends early."""

import copy
import itertools
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags
from helpers import ROOT, call_verbs, changed, config_file, draft, refused, untrained_run, without_timings, write_corpus

from launch import compare
from launch.console import Console
from lm.config import resolve
from lm.data.batches import batches
from lm.errors import Preempted, UserError
from lm.parallel import place
from lm.runs.checkpoint import Checkpoints
from lm.runs.folder import RunFolder
from lm.runs.open import open_best, open_run
from lm.training import train as training
from lm.training.metrics import MetricsLog
from lm.training.train import Listener, prepare, train

pytestmark = pytest.mark.usefixtures("compilations_shared")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """About 600 characters in train, so that an epoch ends within the runs."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), train=40, valid=8, test=8)


def lstm(corpus, **fields):
    """Streamed, with every kind of dropout, and a learning rate that falls when valid stalls."""
    values = dict(
        model__dropout_rate=0.3,
        model__word_dropout_rate=0.1,
        model__weight_drop_rate=0.2,
        model__variational_dropout=True,
        optimizer__learning_rate=0.2,
        optimizer__schedule="plateau",
        optimizer__decay_factor=0.3,  # no binary fraction
        evaluation__rows=2,
        seed=3,
    )
    return draft(corpus, "lstm", **(values | INTERVALS | fields))


def averaged(corpus, **fields):
    """SGD over steps of random length, averaged since valid stalls."""
    values = dict(
        data__seq_len_std=1.5,
        optimizer__name="sgd",
        optimizer__learning_rate=2.0,
        training__averaging="stall",
        training__averaging_patience=1,
        evaluation__rows=2,
        seed=3,
    )
    return draft(corpus, "lstm", **(values | INTERVALS | fields))


def transformer(corpus, **fields):
    """Over shuffled windows, with a cosine and two micro-batches."""
    values = dict(
        model__dropout_rate=0.2,
        optimizer__learning_rate=0.02,
        optimizer__schedule="cosine",
        optimizer__warmup_steps=3,
        training__num_micro_batches=2,
        evaluation__rows=8,
    )
    return draft(corpus, "transformer", **(values | INTERVALS | fields))


INTERVALS = dict(
    training__num_steps=60, training__log_every_steps=3, training__evaluate_every_steps=7, training__checkpoint_every_steps=4
)


def outcome(workdir):
    """All that a run has left, but for timings: metrics, and of each checkpoint every array and the progress."""
    import orbax.checkpoint as ocp

    folder = RunFolder(workdir)
    checkpoints = Checkpoints(folder.checkpoints)
    found = {"metrics": [without_timings(line) for line in folder.read_metrics()], "steps": checkpoints.steps()}
    for step in checkpoints.steps():
        assert checkpoints.damage(step) is None
        found[step, "progress"] = without_timings(checkpoints.progress(step))
        for item in ("params", "training"):
            with ocp.PyTreeCheckpointer() as reader:
                tree = reader.restore((folder.checkpoints / str(step) / item).absolute())
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                found[step, item, jax.tree_util.keystr(path)] = (
                    np.asarray(leaf).dtype,
                    np.shape(leaf),
                    np.asarray(leaf).tobytes(),
                )
    return found


def assert_same_outcome(one, other):
    assert set(one) == set(other)
    assert [name for name in one if one[name] != other[name]] == []


class Interrupted(Exception):
    pass


class StopAt(Listener):
    """Breaks training off right after a step was sent to the devices, before anything is written about it."""

    def __init__(self, step):
        self.step, self.begun_at = step, None

    def started(self, experiment, step):
        self.begun_at = step

    def stepped(self, step):
        if step == self.step:
            raise Interrupted


def interrupt(config, workdir, at):
    """Trains until it is broken off; returns the step at which it had begun."""
    listener = StopAt(at)
    with pytest.raises(Interrupted):
        train(config, str(workdir), listener)
    return listener.begun_at


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Each experiment run in one go: its config and its folder."""
    found = {}
    for name, config in (("lstm", lstm(corpus)), ("averaged", averaged(corpus)), ("transformer", transformer(corpus))):
        found[name] = config, tmp_path_factory.mktemp(name)
        train(config, str(found[name][1]))
    return found


def test_a_clock_that_jumps_changes_nothing(runs, corpus, tmp_path, monkeypatch):
    config, whole = runs["lstm"]
    times = itertools.cycle([1.8e9, 1.0e9, 0.0, 4.0e9, 1.8e9 + 1])  # seconds since 1970, to and fro over decades
    monkeypatch.setattr(time, "time", lambda: next(times))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(times) * 1e9))
    interrupt(config, tmp_path / "run", 30)
    train(config, str(tmp_path / "run"))
    assert_same_outcome(outcome(whole), outcome(tmp_path / "run"))


def test_an_uninterrupted_run_is_what_its_config_says(runs):
    for config, workdir in runs.values():
        lines = list(RunFolder(workdir).read_metrics())
        assert [line["step"] for line in lines if line["split"] == "train"] == list(range(3, 61, 3))
        assert [line["step"] for line in lines if line["split"] == "valid"] == [*range(7, 60, 7), 60]
        for line in lines:
            if config.data.seq_len_std is None:
                assert line["tokens"] == line["step"] * 32
            assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        fields = {"gradient_norm", "clipped_share", "update_norm", "learning_rate", "epoch", "seconds", "tokens_per_second"}
        assert all(fields <= set(line) for line in lines if line["split"] == "train")
        source = batches(resolve(config), prepare(config).train)
        assert [line["epoch"] for line in lines] == [source.epoch(line["step"] - 1) for line in lines] and lines[-1]["epoch"] >= 2
        valid = {line["step"]: line["loss"] for line in lines if line["split"] == "valid"}
        best = min(valid, key=valid.get)
        progress = Checkpoints(workdir / "checkpoints").progress(60)
        assert (progress["best_step"], progress["best_loss"], progress["finished"]) == (best, valid[best], True)
        assert Checkpoints(workdir / "checkpoints").steps() == sorted({best, 56, 60})
        assert lines[0]["loss"] > valid[best]  # it learns
        assert len(list((workdir / "tensorboard").iterdir())) == 1
        if config.optimizer.schedule == "cosine":
            rates = {line["step"]: line["learning_rate"] for line in lines if line["split"] == "train"}
            for step, rate in rates.items():  # of the update that led to it, the first of which is that of step 0
                warm, cosine = step / 3, 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 4) / 57))
                assert rate == pytest.approx(0.02 * (warm if step < 4 else cosine), rel=1e-5)
        if config.optimizer.schedule == "plateau":
            assert lines[-2]["learning_rate"] < 0.2  # what falls must stay so after an interruption


def test_broken_off_anywhere_a_streamed_lstm_ends_the_same(runs, tmp_path, caplog, monkeypatch):
    config, whole = runs["lstm"]
    began = {}
    for at in (2, 6, 8, 15, 31):  # before the first checkpoint, on and between logs, looks and checkpoints
        began[at] = interrupt(config, tmp_path, at)
    assert began == {2: 0, 6: 0, 8: 4, 15: 7, 31: 14}

    # the latest checkpoint is damaged too: the one before takes its place
    (latest, before) = reversed(Checkpoints(tmp_path / "checkpoints").steps()[-2:])
    assert (latest, before) == (28, 24)
    (tmp_path / "checkpoints" / "28" / "progress.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger("lm"), "propagate", True)
        assert interrupt(config, tmp_path, 50) == 24
    assert "the latest sound one is of step 24" in caplog.text
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "split": "tr')  # as if killed while writing
    train(config, str(tmp_path))
    assert_same_outcome(outcome(whole), outcome(tmp_path))


def test_broken_off_anywhere_a_transformer_over_windows_ends_the_same(runs, tmp_path):
    config, whole = runs["transformer"]
    for at in (10, 19):  # each time a line of metrics was written after the last checkpoint
        interrupt(config, tmp_path, at)
    train(config, str(tmp_path))
    assert_same_outcome(outcome(whole), outcome(tmp_path))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_broken_off_anywhere_an_average_over_random_lengths_ends_the_same(runs, tmp_path):
    """Before the mean begins, and after; what a checkpoint calls its parameters is the mean, which valid was scored with."""
    config, whole = runs["averaged"]
    looks = [line for line in RunFolder(whole).read_metrics() if line["split"] == "valid"]
    begins = next(number for number, line in enumerate(looks) if line["averaging"])
    assert 1 <= begins < len(looks) - 2 and all(line["averaging"] for line in looks[begins:])
    for at in (10, looks[begins]["step"] + 2):
        interrupt(config, tmp_path, at)
    train(config, str(tmp_path))
    assert_same_outcome(outcome(whole), outcome(tmp_path))


def test_what_a_checkpoint_calls_its_parameters_is_what_valid_was_scored_with(runs):
    for name, (config, workdir) in runs.items():
        run = open_run(str(workdir))
        line = next(line for line in run.folder.read_metrics() if line["split"] == "valid" and line["step"] == run.step)
        prepared = training.prepare(config, run.folder)
        placement = place(prepared.config)
        look = training.quick_look(prepared.config, prepared.model, prepared.valid, placement)
        assert look(placement.put_state(run.params))["loss"] == pytest.approx(line["loss"], abs=1e-6), name


def launched(config_path, workdir):
    command = [sys.executable, "-m", "launch.train", f"--config={config_path}", f"--workdir={workdir}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoints(process, workdir, number):
    """Waits until so many checkpoints were ever finished."""
    for _ in range(20_000):
        if max(Checkpoints(workdir / "checkpoints").steps(), default=0) >= number:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    pytest.fail("no checkpoint within minutes")


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_asked_to_stop_a_run_saves_the_step_and_ends_the_same(name, runs, tmp_path):
    """Right before and after a log, a look and a checkpoint, twice in a row, and at the last step, which ends the run as ever."""
    config, whole = runs[name]

    class AskAt(Listener):
        def __init__(self, step):
            self.asked_at, self.step = step, None

        def stepped(self, step):
            self.step = step

        def is_asked_to_stop(self):
            return self.step == self.asked_at

    for at in (1, 2, 3, 7, 13, 55):
        with pytest.raises(Preempted, match=f"stopped after step {at}$"):
            train(config, str(tmp_path), AskAt(at))
        assert Checkpoints(tmp_path / "checkpoints").latest_sound() == at
    train(config, str(tmp_path), AskAt(60))
    assert_same_outcome(outcome(whole), outcome(tmp_path))


def test_asked_to_stop_where_nothing_can_be_saved_a_run_does_not_say_that_it_was(corpus, tmp_path, monkeypatch):
    class Ask(Listener):
        def is_asked_to_stop(self):
            return True

    def full(self, step, *_):
        raise UserError(f"the checkpoint of step {step} cannot be written")

    monkeypatch.setattr(Checkpoints, "_save", full)
    with refused("the checkpoint of step 1 cannot be written"):
        train(draft(corpus, "lstm"), str(tmp_path), Ask())


def test_rows_of_a_comparison_are_named_as_their_files_and_folders():
    assert compare._named(["runs/lr0.1", "runs/lr0.01/"], "--workdirs", compare._of_folder).keys() == {"lr0.1", "lr0.01"}
    assert compare._named(["a/lstm.py:runlocal=1", "b/lstm.py"], "--configs", compare._of_file).keys() == {"a-lstm", "b-lstm"}


def test_asked_to_stop_in_its_last_step_a_comparison_begins_no_other_run(corpus, tmp_path, monkeypatch):
    paths = [config_file(tmp_path / f"{name}.py", lstm(corpus, training__num_steps=2)) for name in ("first", "second")]
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Console, "stepped", lambda _, step: signal.raise_signal(signal.SIGTERM) if step == 2 else None)
    flags.FLAGS(["compare", f"--configs={paths[0]},{paths[1]}", f"--workdir={tmp_path / 'runs'}"])
    with pytest.raises(Preempted, match="stopped after step 2$"):
        compare.main([])
    assert Checkpoints(tmp_path / "runs" / "first" / "checkpoints").progress(2)["finished"]
    assert not (tmp_path / "runs" / "second").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def broken_off(config_path, workdir, checkpoint, with_signal):
    """Launches a run and signals it some time after a checkpoint; returns its exit code and standard error."""
    for _ in range(5):
        with launched(config_path, workdir) as process:
            wait_for_checkpoints(process, workdir, checkpoint)
            time.sleep(time.time() % 0.1)  # anywhere between two checkpoints, or within one
            process.send_signal(with_signal)
            _, err = process.communicate()
        if process.returncode != 0:
            return process.returncode, err
        shutil.rmtree(workdir)  # on a busy machine it can be done before the signal comes
    pytest.fail("the run was done before every signal")


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_killed_at_any_moment_a_run_ends_the_same(name, runs, tmp_path):
    """With SIGKILL, through the verb; the LSTM before that with Ctrl-C and SIGTERM. The end is trained in this process."""
    config, whole = runs[name]
    path, workdir = config_file(tmp_path / "config.py", config), tmp_path / "run"
    if name == "lstm":
        code, err = broken_off(path, workdir, 4, signal.SIGINT)
        assert code == 130 and "interrupted" in err and "goes on from the last checkpoint" in err
        assert "Traceback" not in err
        code, err = broken_off(path, workdir, 28, signal.SIGTERM)
        saved = Checkpoints(workdir / "checkpoints").latest_sound()
        assert code == 143 and f"stopped by SIGTERM after step {saved}, which is saved" in err and "Traceback" not in err
    code, _ = broken_off(path, workdir, 42, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert 42 <= Checkpoints(workdir / "checkpoints").latest_sound() < 60
    train(config, str(workdir))
    assert_same_outcome(outcome(whole), outcome(workdir))
    assert not list((workdir / "checkpoints").glob("*.partial"))


def test_a_finished_run_is_left_as_it_is(runs, monkeypatch):
    class Never(Listener):
        def started(self, experiment, step):
            pytest.fail("training began")

    for config, workdir in runs.values():
        before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"}
        result = train(config, str(workdir), Never())
        assert (result.step, result.tokens) == (60, list(RunFolder(workdir).read_metrics())[-1]["tokens"])
        assert result.best_loss == Checkpoints(workdir / "checkpoints").progress(60)["best_loss"]
        assert {path: path.stat().st_mtime_ns for path in before} == before
        others = changed(copy.deepcopy(config), training__evaluate_every_steps=1000)
        train(others, str(workdir), Never())  # what it was not trained with is not noted either
        assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_that_was_broken_off_can_be_asked_to_end_there(corpus, tmp_path):
    """Its last step is looked at then, as that of any run."""
    assert interrupt(lstm(corpus), tmp_path / "stopped", 26) == 0
    shorter = lstm(corpus, training__num_steps=24)
    result = train(shorter, str(tmp_path / "stopped"))
    train(shorter, str(tmp_path / "whole"))
    assert_same_outcome(outcome(tmp_path / "whole"), outcome(tmp_path / "stopped"))
    assert result.step == 24 and math.isfinite(result.best_loss)
    assert interrupt(lstm(corpus), tmp_path / "early", 5) == 0  # before any look
    train(lstm(corpus, training__num_steps=4), str(tmp_path / "early"))
    assert open_run(str(tmp_path / "early")).which == "best"


def test_more_steps_go_on_as_if_meant_from_the_start(runs, corpus, tmp_path):
    assert train(lstm(corpus, training__num_steps=21), str(tmp_path)).step == 21
    assert train(runs["lstm"][0], str(tmp_path)).step == 60
    assert_same_outcome(outcome(runs["lstm"][1]), outcome(tmp_path))
    assert RunFolder(tmp_path).read_config()[0].training.num_steps == 60

    with refused("config.training.num_steps is 59", "has been trained for 60 steps", "at least as many"):
        train(lstm(corpus, training__num_steps=59), str(tmp_path))
    assert RunFolder(tmp_path).read_config()[0].training.num_steps == 60

    with refused("another experiment", "training.num_steps: 60 then, 70 now"):  # a cosine has seen its end
        train(transformer(corpus, training__num_steps=70), str(runs["transformer"][1]))


def test_another_experiment_is_refused(runs, corpus, tmp_path):
    config, workdir = runs["lstm"]
    other = write_corpus(tmp_path / "corpus", train=41, valid=8, test=8)
    with refused(str(workdir), "the text of train, valid, test has changed"):
        train(lstm(other), str(workdir))
    for fields, sentence in (
        (dict(seed=4), "seed: 3 then, 4 now"),
        (dict(model__hidden_dim=12), "model.hidden_dim: 8 then, 12 now"),
        (dict(optimizer__learning_rate=0.1), "optimizer.learning_rate: 0.2 then, 0.1 now"),
    ):
        with refused(str(workdir), sentence):
            train(lstm(corpus, **fields), str(workdir))
    with RunFolder(workdir).locked(), refused(str(workdir), "in use"):
        train(config, str(workdir))


def poisoned(*steps):
    """As lm.data.batches.batches, but the losses of some steps are not finite."""
    whole = training.batches

    def make(*args):
        source = whole(*args)
        batch = source.batch

        def poison(step, rows):
            found = batch(step, rows)
            return found.replace(loss_weights_BT=found.loss_weights_BT * np.nan) if step + 1 in steps else found

        source.batch = poison
        return source

    return make


def test_a_loss_that_is_not_finite_ends_the_run(corpus, tmp_path, monkeypatch):
    """One batch is poisoned: the run names the step, and its checkpoints are from before."""
    config = lstm(corpus, training__num_steps=15)
    closed, close = [], MetricsLog.close
    with monkeypatch.context() as patch:
        patch.setattr(training, "batches", poisoned(11))
        patch.setattr(MetricsLog, "close", lambda log: closed.append(close(log)))
        with refused(
            "loss, gradient or update of step 11 is not finite",
            "learning rate 0.2",
            "config.optimizer.learning_rate",
            "step 8 is kept",
        ):
            train(config, str(tmp_path))
    assert closed == [None]  # an open writer of events complains when Python ends
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest_sound() == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoints.params(8)))
    assert [line["step"] for line in RunFolder(tmp_path).read_metrics()] == [3, 6, 7, 9]
    assert train(config, str(tmp_path)).step == 15  # the batch was at fault, not the run


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_bad_steps_are_left_out_and_the_run_goes_on(policy, corpus, tmp_path, monkeypatch):
    """Also when it is broken off right after one; both policies come to the same model."""
    monkeypatch.setattr(training, "batches", poisoned(2, 11, 12, 17))  # before the first checkpoint; where an epoch begins
    config = lstm(corpus, training__num_steps=18, training__on_bad_step=policy)
    back = []

    class Noting(Listener):
        def rolled_back(self, bad_step, step):
            back.append((bad_step, step))

    train(config, str(tmp_path / policy), Noting())
    assert back == ([(2, 0), (11, 8), (12, 8), (17, 16)] if policy == "rollback" else [])
    lines = list(RunFolder(tmp_path / policy).read_metrics())
    assert [(line["step"], line["skipped_steps"]) for line in lines if "skipped_steps" in line] == [(3, 1), (12, 2), (18, 1)]
    assert all(math.isfinite(line["loss"]) for line in lines)

    for at in (11, 13):
        interrupt(config, tmp_path / "broken off", at)
    train(config, str(tmp_path / "broken off"))
    assert_same_outcome(outcome(tmp_path / policy), outcome(tmp_path / "broken off"))

    other = lstm(corpus, training__num_steps=18, training__on_bad_step="skip")
    train(other, str(tmp_path / "skipped"))
    ends = [outcome(tmp_path / name) for name in (policy, "skipped")]
    names = [name for name in ends[0] if name[0] == 18 and name[1] == "params"]
    assert names and all(ends[0][name] == ends[1][name] for name in names)


_SELDOM = dict(training__log_every_steps=60, training__evaluate_every_steps=60, training__checkpoint_every_steps=None)


@pytest.mark.parametrize(
    ("policy", "fields", "kept"),
    [("skip", {}, "the checkpoint of step 14 is kept"), ("rollback", {}, "step 14"), ("rollback", _SELDOM, "no checkpoint yet")],
)
def test_a_run_of_bad_steps_alone_is_given_up_at_the_tenth(policy, fields, kept, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "batches", poisoned(*range(6, 60)))
    config = lstm(corpus, **{"training__on_bad_step": policy, "training__log_every_steps": 5, **fields})
    with refused("of 10 steps, one soon after the other, was bad", kept):
        train(config, str(tmp_path))


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_bad_steps_with_good_ones_between_do_not_add_up(policy, corpus, tmp_path, monkeypatch):
    bad = range(6, 60, 4)
    monkeypatch.setattr(training, "batches", poisoned(*bad))
    train(lstm(corpus, training__on_bad_step=policy), str(tmp_path))
    lines = list(RunFolder(tmp_path).read_metrics())
    assert sum(line.get("skipped_steps", 0) for line in lines) == len(bad) > 10 and lines[-1]["step"] == 60


def test_a_huge_learning_rate_ends_the_run(corpus, tmp_path):
    huge = dict(optimizer__learning_rate=1e38, optimizer__name="sgd", training__num_steps=50)
    with refused("loss, gradient or update of step 1 is not finite (learning rate 1e+38)", "there was no checkpoint yet"):
        train(draft(corpus, "lstm", **huge), str(tmp_path))
    assert open_run_is_refused(tmp_path)
    warming = draft(corpus, "lstm", **huge, optimizer__warmup_steps=100, training__log_every_steps=50)
    with refused("of step 1 is not finite (learning rate 1e+36)"):  # that step's, not that of the one at which it was seen
        train(warming, str(tmp_path / "warming"))


def test_a_model_that_valid_shows_to_have_diverged_is_not_saved(corpus, tmp_path, monkeypatch):
    """The updates are finite, what they make of the model is not."""
    monkeypatch.setattr(training, "quick_look", lambda *args: lambda params: {"loss": math.inf, "perplexity": math.inf})
    with refused("the loss on valid after step 1 is not finite", "there was no checkpoint yet"):
        train(draft(corpus, "lstm", training__num_steps=1), str(tmp_path))
    assert open_run_is_refused(tmp_path)


def open_run_is_refused(workdir):
    with refused("has no checkpoint yet"):
        open_run(str(workdir))
    return True


def test_stalling_lowers_the_learning_rate_and_then_ends_the_run(corpus, tmp_path):
    """With steps too small to change the loss, each look after the first is a stall."""
    fields = dict(
        optimizer__learning_rate=1e-12,
        optimizer__schedule="plateau",
        optimizer__decay_factor=0.25,
        optimizer__plateau_patience=1,
        training__early_stopping=4,
        training__num_steps=40,
        training__log_every_steps=2,
        training__evaluate_every_steps=2,
    )
    config, workdir = draft(corpus, "lstm", **fields), tmp_path / "a run"
    interrupt(config, workdir, 9)  # what stalled is remembered
    result = train(config, str(workdir))
    assert (result.step, result.best_step) == (10, 2)
    lines = list(RunFolder(workdir).read_metrics())
    rates = {line["step"]: line["learning_rate"] for line in lines if line["split"] == "train"}
    assert rates == pytest.approx({2: 1e-12, 4: 1e-12, 6: 1e-12, 8: 2.5e-13, 10: 2.5e-13}, rel=1e-6, abs=0)
    norms = {line["step"]: line["update_norm"] for line in lines if line["split"] == "train"}
    assert norms[8] / norms[6] == pytest.approx(0.25, rel=0.2)  # and it is what the updates are made with
    assert len({line["loss"] for line in lines if line["split"] == "valid"}) == 1
    progress = Checkpoints(workdir / "checkpoints").progress(10)
    assert (progress["stalled"], progress["stalled_since_decay"], progress["finished"]) == (4, 0, True)
    again = train(config, str(workdir))
    assert (again.step, again.best_step) == (10, 2) and len(list(RunFolder(workdir).read_metrics())) == len(lines)

    verb = ["launch.train", f"--config={config_file(tmp_path / 'config.py', config)}", f"--workdir={workdir}"]
    (told,) = call_verbs([verb], tmp_path / "told")
    assert told.code == 0, told.err
    assert "stopped early, at step 10 of 40: 4 looks at valid in a row brought nothing better" in told.out
    assert f"next: python -m launch.evaluate --workdir='{workdir}' --split=test" in told.out


def test_starting_from_the_best_parameters_of_another_run(runs, corpus, tmp_path):
    config, workdir = runs["lstm"]
    source = open_run(str(workdir))
    other = write_corpus(tmp_path / "other", train=40, valid=8, test=8, seed=9)
    (other / "train.txt").write_text((other / "train.txt").read_text() + "§\n")  # a symbol that the first run does not know

    def tuned(**fields):
        values = dict(training__init_from=str(workdir), optimizer__learning_rate=1e-12, training__num_steps=1)
        return lstm(other, **(values | fields))

    train(tuned(), str(tmp_path / "tuned"))
    tuned_run = open_run(str(tmp_path / "tuned"), "latest")
    assert tuned_run.step == 1 and tuned_run.tokenizer.symbols == source.tokenizer.symbols
    for mine, its in zip(jax.tree.leaves(tuned_run.params), jax.tree.leaves(source.params), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-6, atol=1e-10)

    looks = [line for line in tuned_run.folder.read_metrics() if line["split"] == "valid"]
    assert [(line["step"], line["tokens"], line["epoch"]) for line in looks[:1]] == [(0, 0, 0)]  # before anything is learnt
    assert looks[0]["loss"] == pytest.approx(looks[1]["loss"], rel=1e-5)
    train(tuned(training__averaging="start"), str(tmp_path / "averaged"))  # the mean starts from them, too
    averaged = [line for line in RunFolder(tmp_path / "averaged").read_metrics() if line["split"] == "valid"]
    assert [line["loss"] for line in averaged] == pytest.approx([line["loss"] for line in looks], rel=1e-5)

    headless = untrained_run(draft(other, "lstm"), tmp_path / "headless", steps=(1, 2))
    shutil.rmtree(headless / "checkpoints" / str(open_run(str(headless)).step))
    with refused("config.training.init_from", "has no sound checkpoint that was best on valid"):
        train(draft(other, "lstm", training__init_from=str(headless)), str(tmp_path / "from_headless"))

    size = source.tokenizer.vocab_size
    with refused("config.training.init_from", "another model", f"embedding/table is ({size}, 8) there and ({size}, 12) here"):
        train(tuned(model__hidden_dim=12), str(tmp_path / "wider"))
    with refused("config.model.input_gate is 'capped'", "config.training.init_from", "was trained with 'free'; make them equal"):
        train(tuned(model__input_gate="capped"), str(tmp_path / "capped"))
    with refused("config.model.skip_connections is True", "was trained with False"):
        train(tuned(model__skip_connections=True), str(tmp_path / "skipping"))
    attentive = str(runs["transformer"][1])
    for name, value in (("num_heads", 4), ("positions", "sinusoidal"), ("activation", "relu")):
        with refused(f"config.model.{name} is {value!r}", "config.training.init_from", "make them equal"):
            train(transformer(corpus, training__init_from=attentive, **{f"model__{name}": value}), str(tmp_path / name))
    with refused("config.training.init_from", "char tokenizer", "config.data.tokenizer is 'byte'", "make them equal"):
        train(tuned(data__tokenizer="byte"), str(tmp_path / "bytes"))
    with refused(f"{tmp_path / 'nowhere'} holds no run"):
        train(tuned(training__init_from=str(tmp_path / "nowhere")), str(tmp_path / "none"))
    assert config.training.init_from is None
    words = draft(other, "lstm", data__tokenizer="word")
    start = untrained_run(words, tmp_path / "words")
    with refused("config.data.min_count is 2", "config.training.init_from", "has 1; make them equal"):
        train(changed(words, data__min_count=2, training__init_from=str(start)), str(tmp_path / "rarer"))


def test_parameters_that_nothing_improves_on_stay_the_best(runs, corpus, tmp_path):
    """Also where training was broken off after the first look, and is not looked at twice."""
    _, workdir = runs["lstm"]
    rash = dict(optimizer__learning_rate=100.0, optimizer__clip_norm=None)
    config = lstm(corpus, training__init_from=str(workdir), training__num_steps=4, **rash)
    interrupt(config, tmp_path, at=1)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [0]
    result = train(config, str(tmp_path))
    assert (result.step, result.best_step) == (4, 0)
    steps = [line["step"] for line in RunFolder(tmp_path).read_metrics() if line["split"] == "valid"]
    assert steps == sorted(set(steps)) and steps[0] == 0
    source = open_run(str(workdir))
    for mine, its in zip(jax.tree.leaves(open_run(str(tmp_path)).params), jax.tree.leaves(source.params), strict=True):
        np.testing.assert_array_equal(mine, its)


def test_a_start_that_could_not_be_saved_is_looked_at_anew_and_told_once(runs, corpus, tmp_path, monkeypatch):
    config = lstm(corpus, training__init_from=str(runs["lstm"][1]), training__num_steps=1)

    def full(*_):
        raise UserError("the disk is full")

    with monkeypatch.context() as patch, refused("the disk is full"):
        patch.setattr(Checkpoints, "_save", full)
        train(config, str(tmp_path))
    train(config, str(tmp_path))
    assert [line["step"] for line in RunFolder(tmp_path).read_metrics() if line["split"] == "valid"] == [0, 1]


def test_speed_is_told_of_the_steps_since_the_checkpoint(corpus, tmp_path):
    """Of a run that was broken off between two lines."""
    interrupt(lstm(corpus), tmp_path, at=9)  # saved after step 8, while the last line is of step 6
    seconds = Checkpoints(tmp_path / "checkpoints").progress(8)["seconds"]
    interrupt(lstm(corpus), tmp_path, at=10)
    line = next(line for line in RunFolder(tmp_path).read_metrics() if line["step"] == 9)
    tokens = line["tokens"] / 9
    assert line["tokens_per_second"] == pytest.approx(tokens / (line["seconds"] - seconds), rel=0.05)


def test_a_run_without_its_best_checkpoint_is_not_compared(runs, tmp_path):
    _, workdir = runs["lstm"]
    shutil.copytree(workdir, tmp_path / "run")
    run = open_best(str(tmp_path / "run"))
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(run.step + 1, run.params, {"step": np.int32(run.step + 1)}, {"best_step": run.step})
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(run.step))
    with refused(f"{tmp_path / 'run'} has no sound checkpoint that was best on valid", "launch.evaluate"):
        open_best(str(tmp_path / "run"))


def test_a_tokenizer_without_a_config_is_of_no_run(corpus, tmp_path):
    """As after a kill between the two."""
    train(lstm(corpus, training__num_steps=1, data__tokenizer="byte"), str(tmp_path / "bytes"))
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "bytes" / "tokenizer.json", tmp_path / "run")
    train(lstm(corpus, training__num_steps=1), str(tmp_path / "run"))
    assert open_run(str(tmp_path / "run")).tokenizer.name == "char"


def test_checkpoints_without_a_config_are_of_no_run_that_could_go_on(runs, corpus, tmp_path):
    shutil.copytree(runs["lstm"][1], tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    before = outcome(tmp_path / "run")
    with refused(f"{tmp_path / 'run'} has checkpoints but no config.json", "put it back"):
        train(lstm(corpus, optimizer__learning_rate=0.5), str(tmp_path / "run"))
    with refused("there is no config.json; put it back"):
        open_run(str(tmp_path / "run"))
    shutil.copy(runs["lstm"][1] / "config.json", tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    with refused("tokenizer.json is gone; put it back"):
        open_run(str(tmp_path / "run"))
    assert_same_outcome(outcome(tmp_path / "run"), before)


def test_metrics_are_not_lost_without_a_word(runs, corpus, tmp_path, caplog):
    shutil.copytree(runs["lstm"][1], tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train(lstm(corpus, training__num_steps=61), str(tmp_path / "run"))
    assert "metrics.jsonl is gone: what it told of the steps until 60 is lost" in caplog.text


def test_an_ngram_that_was_killed_at_its_end_knows_its_size(corpus, tmp_path, monkeypatch):
    save, config = Checkpoints.save, draft(corpus, "ngram", model__ngram_order=2)

    def save_and_die(*arguments):
        save(*arguments)
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Checkpoints, "save", save_and_die)
        train(config, str(tmp_path))
    train(config, str(tmp_path))
    assert RunFolder(tmp_path).read_config()[1]["num_params"] > 50


def test_an_ngram_is_counted_once(corpus, tmp_path):
    config = draft(corpus, "ngram", model__ngram_order=3)
    result = train(config, str(tmp_path))
    assert (result.step, result.tokens) == (1, len((corpus / "train.txt").read_text()))
    before = outcome(tmp_path)
    config_json = (tmp_path / "config.json").read_bytes()
    assert json.loads(config_json)["num_params"] > 100
    again = train(config, str(tmp_path))
    assert again == result
    assert_same_outcome(outcome(tmp_path), before)
    assert (tmp_path / "config.json").read_bytes() == config_json and len(before["metrics"]) == 1
    with refused("model.ngram_order: 3 then, 2 now"):
        train(changed(config, model__ngram_order=2), str(tmp_path))
