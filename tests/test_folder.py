"""lm.runs.folder and lm.files: one writer at a time, metrics taken back to a step, and refusing another experiment's folder."""

import fcntl
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, changed, refused

from lm import files
from lm.config import Config, from_json, resolve
from lm.runs import folder as folders
from lm.runs.folder import RunFolder, environment


def test_a_folder_has_one_writer(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        with (
            refused(f"--workdir {tmp_path / 'run'} is in use", f"process {os.getpid()} on "),
            RunFolder(tmp_path / "run").locked(),
        ):
            pass
        with RunFolder(tmp_path / "other").locked():
            pass
    with folder.locked():  # given back
        pass
    with pytest.raises(RuntimeError), folder.locked():
        raise RuntimeError
    with folder.locked():
        pass


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path):
    code = (
        "import sys; from lm.runs.folder import RunFolder\n"
        f"with RunFolder({str(tmp_path)!r}).locked():\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with refused(f"--workdir {tmp_path} is in use by another run", f"process {holder.pid} on"), RunFolder(tmp_path).locked():
            pass
        holder.kill()
    with RunFolder(tmp_path).locked():
        pass


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_on_a_full_disk_a_folder_is_locked_all_the_same(tmp_path):
    (tmp_path / ".lock").symlink_to("/dev/full")
    with RunFolder(tmp_path).locked(), open("/dev/full") as again, pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with refused(f"--workdir {place}", "give a folder"), RunFolder(place).locked():
            pass


def metrics(step, split="train"):
    return {"step": step, "split": split, "tokens": 64 * step, "seconds": 0.5 * step, "loss": 1 / step}


def test_metrics_are_appended_read_and_cut(tmp_path):
    folder = RunFolder(tmp_path)
    assert list(folder.read_metrics()) == []
    assert folder.cut_metrics(5) == []
    lines = [metrics(step, split) for step in (2, 4, 6) for split in ("train", "valid")]
    for line in lines:
        folder.append_metrics(line)
    assert list(folder.read_metrics()) == lines
    assert folder.cut_metrics(4) == lines[:4] == list(folder.read_metrics())
    assert folder.metrics.read_text() == "".join(json.dumps(line) + "\n" for line in lines[:4])
    folder.append_metrics(lines[4])
    assert list(folder.read_metrics()) == lines[:5]
    assert folder.cut_metrics(0) == [] and folder.metrics.read_text() == ""


@pytest.mark.parametrize("cut", [1, 2, 20, 40])
def test_a_line_that_was_cut_short_is_left_out(cut, tmp_path):
    folder = RunFolder(tmp_path)
    lines = [metrics(step) for step in (1, 2, 3)]
    for line in lines:
        folder.append_metrics(line)
    folder.metrics.write_text(folder.metrics.read_text()[:-cut])
    whole = lines if cut == 1 else lines[:2]  # only the newline is missing
    assert list(folder.read_metrics()) == whole
    assert folder.cut_metrics(9) == whole
    folder.append_metrics(metrics(4))
    assert list(folder.read_metrics()) == [*whole, metrics(4)]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (b"5", "it is no JSON object"),
        (b"{}", "it has no 'split'"),
        (b"\xff\xfe", "Expecting value"),
        (b'{"step": 1, "spl', "Unterminated string"),
        (b'{"split": "train", "step": "1", "tokens": 64, "seconds": 0.5}', "step is '1'"),
        (b'{"split": "train", "step": 1, "tokens": 64}', "it has no 'seconds'"),
        (b'{"split": "train", "step": 1, "tokens": "64", "seconds": 0.5}', "tokens is '64'"),
    ],
)
def test_another_line_that_is_damaged_is_named_and_nothing_is_lost(damage, said, tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append_metrics(metrics(step))
    lines = folder.metrics.read_bytes().split(b"\n")
    folder.metrics.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]))
    before = folder.metrics.read_bytes()
    with refused(str(folder.metrics), "damaged in line 2", said, "take it out"):
        folder.cut_metrics(3)
    assert folder.metrics.read_bytes() == before


def test_metrics_that_cannot_be_written(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.mkdir()
    with refused(str(folder.metrics), "cannot be written"):
        folder.append_metrics({"step": 1})


FACTS = {"vocab_size": 50, "splits": {"train": "abc"}}


def test_the_config_comes_back(tmp_path):
    draft = changed(Config(), model__layer_dims=(8, 4), model__tie_embeddings=False)
    RunFolder(tmp_path).write_config(draft, resolve(draft), {"vocab_size": 50})
    config, saved = RunFolder(tmp_path).read_config()
    assert config == resolve(draft)
    assert saved["vocab_size"] == 50
    assert (saved["given"]["model"]["num_layers"], saved["resolved"]["model"]["num_layers"]) == (None, 2)


def test_another_experiment_is_refused_by_the_fields_that_differ(tmp_path):
    folder, config = RunFolder(tmp_path), resolve(Config())
    folder.write_config(Config(), config, FACTS)
    folder.check_same_experiment(config, FACTS)
    folder.check_same_experiment(resolve(changed(Config(), training__num_steps=2, data__prefetch=0)), FACTS)
    other = resolve(changed(Config(), seed=3, model__hidden_dim=8))
    with refused(str(tmp_path), "model.hidden_dim: 256 then, 8 now", "seed: 0 then, 3 now", "another --workdir"):
        folder.check_same_experiment(other, FACTS)
    with refused(str(tmp_path), "vocab_size: 50 then, 60 now"):
        folder.check_same_experiment(config, {**FACTS, "vocab_size": 60})
    with refused(str(tmp_path), "the text of train has changed"):
        folder.check_same_experiment(config, {**FACTS, "splits": {"train": "abd"}})
    with refused(str(tmp_path), "its tokenizer.json has changed"):
        folder.check_same_experiment(config, {**FACTS, "tokenizer_sha256": "abd"})


def test_of_a_run_that_has_ended_only_the_places_of_files_change(tmp_path):
    def draft(**fields):
        return changed(Config(), **{"data__source": "text", "data__path": "/then", **fields})

    folder = RunFolder(tmp_path)
    folder.write_config(draft(), resolve(draft()), FACTS)
    before = folder.config.stat()
    folder.note_places(draft(training__num_steps=2000, training__evaluate_every_steps=7))
    after = folder.config.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    folder.note_places(draft(data__path="/now", data__cache_dir="/cache", training__num_steps=2000))
    found, saved = folder.read_config()
    for data in (found.data, from_json(saved["given"]).data):
        assert (data.path, data.cache_dir) == ("/now", "/cache")
    assert found.training == resolve(draft()).training and {name: saved[name] for name in FACTS} == FACTS


def test_a_run_that_is_older_than_some_fields_goes_on(tmp_path):
    """They have the values that they get today where they are left open; another one is another experiment."""
    folder, config = RunFolder(tmp_path), resolve(changed(Config(), model__num_params=10_000))
    folder.write_config(changed(Config(), model__num_params=10_000), config, FACTS)
    saved = json.loads(folder.config.read_text())
    for form in ("given", "resolved"):
        del saved[form]["model"]["skip_connections"], saved[form]["evaluation"]
    folder.config.write_text(json.dumps(saved))
    assert folder.read_config()[0] == config
    folder.check_same_experiment(config, FACTS)
    with refused("model.skip_connections: False then, True now"):
        folder.check_same_experiment(resolve(changed(Config(), model__num_params=10_000, model__skip_connections=True)), FACTS)


def test_a_folder_without_a_run_or_with_a_damaged_one(tmp_path):
    with refused(f"{tmp_path} holds no run", "config.json", "train one there first"):
        RunFolder(tmp_path).read_config()
    with refused("holds no run"):
        RunFolder(tmp_path / "nowhere").read_config()
    folder = RunFolder(tmp_path)
    wrong = ("3", '{"model": 3}', "null")
    for content in ("", "{", "[]", "{}", "3", *(f'{{"given": {{}}, "resolved": {value}}}' for value in wrong)):
        folder.config.write_text(content)
        with refused(str(folder.config), "is damaged"):
            folder.read_config()
    folder.config.write_text("{}")
    with refused("is damaged: it has no 'resolved'"):
        folder.read_config()
    folder.config.write_text('{"given": {}, "resolved": {"model": {"hiden_dim": 3}}}')
    with refused(f"{folder.config} is damaged, or of another version of the code", "config.model.hiden_dim does not exist"):
        folder.read_config()
    for field, value in (("num_layers", "one"), ("architecture", "lxtm"), ("dropout_rate", -1)):
        folder.config.write_text(json.dumps({"given": {}, "resolved": {"model": {field: value}}}))
        with refused(f"{folder.config} is damaged, or", f": config.model.{field} is {value!r}"):
            folder.read_config()
    folder.config.unlink()
    folder.config.mkdir()
    with refused(str(folder.config), "cannot be read"):
        folder.read_config()


def test_the_environment_says_what_ran(tmp_path):
    import jax

    RunFolder(tmp_path).write_environment({"platform": "cpu", "num_devices": 3})
    saved = json.loads((tmp_path / "environment.json").read_text())
    assert saved["jax"] == jax.__version__ and saved["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (saved["platform"], saved["num_devices"]) == ("cpu", 3)
    assert set(saved) >= {"date", "command", "commit", "hardware", "flax", "optax", "numpy"}
    assert environment()["command"]


def test_what_a_run_was_in_before_it_moved_is_kept(tmp_path, monkeypatch):
    folder, machines = RunFolder(tmp_path), iter(["old", "old", "new", "new"])
    monkeypatch.setattr(folders, "environment", lambda: {"date": "today", "command": "this", "hardware": next(machines)})
    folder.environment.write_text('{"hardware": "of something else"}')
    for goes_on in (False, True, True, True):
        folder.write_environment({"platform": "cpu"}, goes_on)
    found = json.loads(folder.environment.read_text())
    assert found.pop("earlier") == [{"date": "today", "hardware": "old", "platform": "cpu"}]
    assert found == {"date": "today", "command": "this", "hardware": "new", "platform": "cpu"}
    folder.environment.write_text("{")  # damaged
    machines = iter(["new"])
    folder.write_environment({"platform": "cpu"}, goes_on=True)
    assert json.loads(folder.environment.read_text()) == found


@pytest.mark.parametrize(
    "told, shown",
    [
        ("model name\t: Abacus 3\nflags\t\t: fpu avx2 avx512f\n\nmodel name\t: Abacus 3\n", "Abacus 3 with AVX-512"),
        ("flags: avx avx2\nmodel name: Abacus: new\n", "Abacus: new with AVX2"),
        ("model name: Abacus\nFeatures: neon\n", "Abacus"),
    ],
)
def test_machines_whose_processors_have_one_name_are_told_apart(told, shown, tmp_path):
    (tmp_path / "cpuinfo").write_text(told)
    assert folders._processor(tmp_path / "cpuinfo") == shown
    assert folders._processor(tmp_path / "none")  # as elsewhere than on Linux


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "a.json"
    files.write_json(path, {"a": "ü"})
    assert files.read_json(path, "missing") == {"a": "ü"} and os.stat(path).st_mode & 0o777 == 0o644

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with refused(str(path), "cannot be written", "No space left"):
            files.write_json(path, {"a": 2})
    assert files.read_json(path, "missing") == {"a": "ü"}
    assert list(path.parent.iterdir()) == [path]  # nothing half-made beside it

    with refused(str(path / "b"), "cannot be written"):
        files.write_json(path / "b", {})
    with refused("it is missing"):
        files.read_json(tmp_path / "nowhere.json", "it is missing")
    path.write_bytes(b"\xff")
    with refused(str(path), "is damaged"):
        files.read_json(path, "missing")
