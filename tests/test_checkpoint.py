"""lm.runs.checkpoint: what is saved comes back exactly, what is damaged is noticed, and what is kept."""

import errno
import json
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refused

from lm.errors import UserError
from lm.runs import checkpoint
from lm.runs.checkpoint import Checkpoints, check_like, shapes_of
from lm.training.progress import Progress


@pytest.fixture
def warnings(caplog, monkeypatch):
    """Returns what the module has warned of so far."""
    monkeypatch.setattr(logging.getLogger("lm"), "propagate", True)  # the verbs take their loggers for themselves
    return lambda: [record.getMessage() for record in caplog.records if record.name == "lm.runs.checkpoint"]


def params_at(step):
    return {"embedding": {"table": np.full((3, 2), step, np.float32)}, "output": {"bias": np.arange(3, dtype=np.float32)}}


def training_at(step):
    return {"state": {"step": np.int32(step)}, "carry": [np.full((2, 2), step, np.float32)]}


def save(folder, *steps, best=None):
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            checkpoints.save(step, params_at(step), training_at(step), {"best_step": best or step, "best_loss": 1.5})
    return checkpoints


def files(folder, step):
    return sorted(path for path in (folder / str(step)).rglob("*") if path.is_file() and path.name != "manifest.json")


def array_of(folder, step):
    """The file that holds the values of the parameters."""
    return max(
        (path for path in files(folder, step) if "params" in path.parts and "d" in path.parts), key=lambda p: p.stat().st_size
    )


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(left).dtype == np.asarray(right).dtype and np.shape(left) == np.shape(right)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    floats = np.array([[np.nan, -0.0, np.inf], [1e-42, 1 / 3, np.finfo(np.float32).max]], np.float32)
    params = {"a": {"kernel": floats, "keys": np.array([2**62 + 1, -5], np.int64)}, "b": np.array(2.5, np.float64)}
    training = {
        "step": np.int32(7),
        "counts": (np.float32(0.1), [np.array(True), np.arange(4, dtype=np.uint16)]),
        "moments": {"mu": -floats, "nothing": None},
        "half": np.asarray(jnp.arange(3, dtype=jnp.bfloat16)),
    }
    progress = {"best_step": 7, "best_loss": float("inf"), "seconds": 0.1, "finished": False}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, params, training, progress)
    again = Checkpoints(tmp_path / "checkpoints")
    back_params, back_training = again.restore(7, params, training)
    assert_same(back_params, params)
    assert_same(back_training, training)
    assert_same(again.params(7), params)
    assert again.progress(7) == progress
    assert again.damage(7) is None


def test_saving_goes_on_in_the_background_and_is_waited_for(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        params = params_at(1)
        checkpoints.save(1, params, training_at(1), {"best_step": 1})
        checkpoints.save(2, params_at(2), training_at(2), {"best_step": 1})  # waits for the first
        assert 1 in checkpoints.steps()
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
    assert Checkpoints(tmp_path / "nowhere").steps() == []


def test_the_best_and_the_two_latest_are_kept(tmp_path):
    save(tmp_path, 10, best=10)
    kept = {20: [10, 20], 30: [10, 20, 30], 40: [10, 30, 40]}
    for step, expected in kept.items():
        assert save(tmp_path, step, best=10).steps() == expected
    assert save(tmp_path, 50, best=50).steps() == [40, 50]
    assert save(tmp_path, 60, best=None).steps() == [50, 60]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["50", "60"]
    for step in (50, 60):
        assert Checkpoints(tmp_path).params(step)["embedding"]["table"][0, 0] == step


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    save(tmp_path, 1, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, params_at(9), training_at(9), {"best_step": 2})
    assert checkpoints.params(2)["embedding"]["table"][0, 0] == 9 and checkpoints.damage(2) is None


def test_what_was_never_finished_does_not_count(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "3").mkdir()  # removed half-way, or never sealed
    shutil.copytree(tmp_path / "2" / "params", tmp_path / "3" / "params")
    shutil.copytree(tmp_path / "2", tmp_path / "4.partial")
    (tmp_path / "notes").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1, 2] and checkpoints.latest_sound() == 2
    save(tmp_path, 4)
    assert Checkpoints(tmp_path).latest_sound() == 4 and not (tmp_path / "4.partial").exists()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a truncated array": (lambda folder: array_of(folder, 3).write_bytes(array_of(folder, 3).read_bytes()[:-1]), "not as it was"),
    "a flipped bit": (lambda folder: flip(array_of(folder, 3)), "is not as it was written"),
    "a flipped bit in the progress": (lambda folder: flip(folder / "3" / "progress.json"), "progress.json is not as it was"),
    "a missing file": (lambda folder: files(folder, 3)[0].unlink(), "is missing"),
    "an empty file": (lambda folder: array_of(folder, 3).write_bytes(b""), "is not as it was written"),
    "missing parameters": (lambda folder: shutil.rmtree(folder / "3" / "params"), "is missing"),
    "a cut manifest": (lambda folder: (folder / "3" / "manifest.json").write_text('{"step": 3, "sha'), "manifest"),
    "an empty manifest": (lambda folder: (folder / "3" / "manifest.json").write_text("{}"), "manifest"),
    "an odd manifest": (lambda folder: (folder / "3" / "manifest.json").write_text('{"sha256": 3}'), "manifest"),
}


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, warnings):
    save(tmp_path / "sound", 1, 2, 3)
    for number, (name, (harm, reason)) in enumerate(DAMAGES.items(), 1):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "sound", folder)
        harm(folder)
        checkpoints = Checkpoints(folder)
        assert reason in checkpoints.damage(3), name
        assert checkpoints.latest_sound() == 2, name
        assert len(warnings()) == number and reason in warnings()[-1], name
        assert str(folder / "3") in warnings()[-1] and "the latest sound one is of step 2" in warnings()[-1]
        with refused(f"checkpoint {folder / '3'} cannot be used", reason, "choose another --step"):
            checkpoints.choose("3")
        assert checkpoints.damage(2) is None and checkpoints.choose("2") == (2, "2")
    assert Checkpoints(tmp_path / "sound").latest_sound() == 3 and len(warnings()) == len(DAMAGES)


def test_nothing_sound_is_one_sentence(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        flip(array_of(tmp_path, step))
    with refused(
        f"checkpoint {tmp_path / '1'} cannot be used", f"checkpoint {tmp_path / '2'} cannot be used", f"remove {tmp_path}"
    ):
        Checkpoints(tmp_path).latest_sound()
    assert Checkpoints(tmp_path / "none").latest_sound() is None


def test_another_model_s_checkpoint_is_passed_over_like_a_damaged_one(tmp_path, warnings):
    save(tmp_path, 1, 2)
    wider = {**params_at(1), "output": {"bias": np.zeros(4, np.float32)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, wider, training_at(3), {"best_step": 3})
    ours = Checkpoints(tmp_path, shapes_of(params_at(1)))
    assert ours.latest_sound() == 2
    assert "another model: output/bias is (4,) there and (3,) here" in warnings()[-1]
    assert Checkpoints(tmp_path, shapes_of(wider)).latest_sound() == 3
    assert Checkpoints(tmp_path).latest_sound() == 3
    with refused("output/bias is (3,) there and (4,) here", "no sound one"):
        shutil.rmtree(tmp_path / "3")
        Checkpoints(tmp_path, shapes_of(wider)).latest_sound()


def test_a_manifest_that_lists_too_little_is_damage(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "1" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": {}}))
    assert Checkpoints(tmp_path).damage(1) == "progress.json is missing"


def test_a_removed_manifest_is_damage(tmp_path, warnings):
    save(tmp_path, 1, 2, 3)
    (tmp_path / "3" / "manifest.json").unlink()
    assert Checkpoints(tmp_path).latest_sound() == 2
    assert "manifest.json is missing" in warnings()[-1]
    shutil.copytree(tmp_path / "3", tmp_path / "alone" / "3")
    with refused(str(tmp_path / "alone" / "3"), "manifest.json is missing", "no sound one"):  # never a silent start anew
        Checkpoints(tmp_path / "alone").choose("best")
    with refused("--step=3 names no checkpoint", "best, latest, 2"):
        Checkpoints(tmp_path).choose("3")


def test_another_model_is_refused_by_the_first_array_that_differs(tmp_path):
    save(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path)
    where = f"checkpoint {tmp_path / '1'}: it belongs to another model"
    wider = {**params_at(1), "output": {"bias": np.zeros(4)}}
    with refused(where, "output/bias is (3,) there and (4,) here"):
        checkpoints.restore(1, wider, training_at(1))
    with refused(where, "embedding/table is (3, 2) there and missing here"):
        checkpoints.restore(1, {"output": {"bias": np.zeros(3)}}, training_at(1))
    with refused(where, "output/kernel is missing there and (2,) here"):
        checkpoints.restore(1, {**params_at(1), "output": {"bias": np.zeros(3), "kernel": np.zeros(2)}}, training_at(1))
    another_version = f"checkpoint {tmp_path / '1'} is of another version of the code"
    with refused(another_version, "carry/0 is (2, 2) there and missing here"):
        checkpoints.restore(1, params_at(1), {**training_at(1), "carry": None})
    check_like(params_at(1), params_at(2), "values do not matter")


def test_files_that_the_disk_does_not_give_are_damage(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def failing(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(checkpoint, "sha256_of", failing)
    assert Checkpoints(tmp_path).damage(1) == "its files cannot be read: Input/output error"


def test_progress_of_another_version():
    assert Progress.from_json({"seconds": 3.0}) == Progress(seconds=3.0)
    with refused("progress.json has momentum", "another version of the code"):
        Progress.from_json({"seconds": 3.0, "momentum": 1})


def test_files_that_orbax_cannot_read(tmp_path):
    save(tmp_path, 1)
    for path in files(tmp_path, 1):
        path.write_bytes(b"?")
    with refused(f"checkpoint {tmp_path / '1'} cannot be read"):
        Checkpoints(tmp_path).params(1)


def test_where_a_later_checkpoint_is_damaged_none_is_called_the_best(tmp_path, warnings):
    """It might have been better than what the earlier ones call so."""
    save(tmp_path, 1, 2, best=1)
    save(tmp_path, 3, best=3)
    assert Checkpoints(tmp_path).choose("best") == (3, "best")
    flip(array_of(tmp_path, 3))
    assert Checkpoints(tmp_path).choose("best") == (2, "latest") and len(warnings()) == 1


def test_choosing_a_checkpoint(tmp_path, warnings):
    folder = tmp_path / "run" / "checkpoints"
    with refused(f"{tmp_path / 'run'} has no checkpoint yet", "train it first"):
        Checkpoints(folder).choose("best")
    save(folder, 1, 2, 3, 4, best=1)
    checkpoints = Checkpoints(folder)
    assert [checkpoints.choose(which) for which in ("best", "latest", "1", "3")] == [
        (1, "best"),
        (4, "latest"),
        (1, "1"),
        (3, "3"),
    ]
    for which in ("2", "5", "newest", "-1", ""):
        with refused(f"--step={which} names no checkpoint", "best, latest, 1, 3, 4"):
            checkpoints.choose(which)
    assert warnings() == []

    flip(array_of(folder, 1))
    assert checkpoints.choose("best") == (4, "latest")  # a figure of it must not pass for the best one's
    assert "best checkpoint (step 1) is missing or damaged; the latest one is of step 4" in warnings()[0]
    shutil.rmtree(folder / "1")
    assert checkpoints.choose("best") == (4, "latest") and len(warnings()) == 2
    flip(array_of(folder, 4))
    assert checkpoints.choose("latest") == (3, "latest")


def test_what_was_replaced_while_it_was_chosen_is_not_called_damaged(tmp_path, warnings, monkeypatch):
    """By a run in training: whoever reads it tries again."""
    checkpoints = Checkpoints(tmp_path)
    save(tmp_path, 1, best=1)
    for method, new in (("latest_sound", 2), ("damage", 9)):  # a new best; and when all that were listed are gone
        with monkeypatch.context() as patch:

            def replaced_first(*args, method=method, new=new):
                patch.undo()
                for step in range(new - 2, new + 1):
                    save(tmp_path, max(step, 1), best=max(step, 1))
                return getattr(checkpoints, method)(*args)

            patch.setattr(checkpoints, method, replaced_first)
            with pytest.raises(FileNotFoundError):
                checkpoints.choose("best")
        assert checkpoints.choose("best") == (new, "best")
    assert warnings() == []
    with refused("--step=² names no checkpoint"):
        checkpoints.choose("²")
    (tmp_path / "²").mkdir()
    assert checkpoints.choose("latest") == (9, "latest")


def test_a_disk_that_is_full_leaves_the_earlier_ones(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    sealed = {path: path.read_bytes() for step in (1, 2) for path in files(tmp_path, step)}

    def full(path, text):
        raise UserError(f"{path} cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", full)
        checkpoints = Checkpoints(tmp_path)
        with (
            refused("checkpoint of step 3 cannot be written", str(tmp_path), "No space left", "earlier ones are untouched"),
            checkpoints,
        ):
            checkpoints.save(3, params_at(3), training_at(3), {"best_step": 1})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
        assert {path: path.read_bytes() for path in sealed} == sealed

        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(3, params_at(3), training_at(3), {"best_step": 1})
        with refused("checkpoint of step 3 cannot be written"):
            checkpoints.wait()
        checkpoints.wait()  # told once
        with pytest.raises(RuntimeError, match="the first error"), checkpoints:
            checkpoints.save(3, params_at(3), training_at(3), {"best_step": 1})
            raise RuntimeError("the first error is the one to tell")
    assert save(tmp_path, 3).steps() == [2, 3]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "2.partial" / "params").mkdir(parents=True)
    assert save(tmp_path, 3).steps() == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with refused("checkpoint of step 1 cannot be written", str(tmp_path / "file")):
        save(tmp_path / "file" / "checkpoints", 1)
    with refused("checkpoint of step 1 cannot be written", str(tmp_path / "file")):
        save(tmp_path / "file", 1)


def test_the_manifest_names_every_file(tmp_path):
    save(tmp_path, 5)
    manifest = json.loads((tmp_path / "5" / "manifest.json").read_text())
    assert manifest["step"] == 5
    assert {tmp_path / "5" / name for name in manifest["sha256"]} == set(files(tmp_path, 5))
    assert len(manifest["sha256"]) > 3 and all(len(digest) == 64 for digest in manifest["sha256"].values())


@pytest.mark.parametrize(
    "steps, best, damaged, sound, now, kept",
    [
        ((20, 30, 40), 20, (30, 40), 20, 25, [20, 25]),
        ((10, 20, 40), 10, (40,), 20, 30, [10, 20, 30]),
    ],
)
def test_what_is_saved_after_damaged_ones_were_passed_over_is_kept(tmp_path, steps, best, damaged, sound, now, kept):
    save(tmp_path, *steps, best=best)
    for step in damaged:
        (tmp_path / str(step) / "progress.json").write_text("{}")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == list(steps) and checkpoints.latest_sound() == sound
    save(tmp_path, now, best=best)
    assert checkpoints.steps() == kept and checkpoints.latest_sound() == now
