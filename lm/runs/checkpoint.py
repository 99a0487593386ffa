"""Checkpoints of a run: saved by orbax beside the run, sealed with a manifest of hashes, verified before they are restored.

`checkpoints/<step>/` holds `params/` and `training/` (orbax), `progress.json` and, written last, `manifest.json` with the
sha256 of every other file. A folder without a manifest was never finished and does not count. Orbax notices a truncated
file but not a flipped bit; the manifest notices both.
"""

import concurrent.futures
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lm import processes
from lm.errors import UserError
from lm.files import sha256_of, write_atomically

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    Saving returns at once and goes on in a thread; the next save, `wait` or leaving the `with` waits for it and raises what
    went wrong. Kept are the best, and the two latest (so that a damaged one has a predecessor).

    Attributes:
      shapes: path -> shape of the parameters that a checkpoint of this run has, so that one of another model counts as
        damaged; None: not known.
    """

    def __init__(self, folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]] | None = None):
        self._folder, self.shapes = folder.absolute(), shapes
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        del error, trace
        try:
            self.wait()
        except UserError:
            if kind is None:  # else the first error is the one to tell
                raise
        finally:
            self._executor.shutdown()

    def steps(self) -> list[int]:
        """The finished checkpoints, in order."""
        return [step for step in self._numbered() if (self._folder / str(step) / "manifest.json").exists()]

    def _numbered(self):
        """All that look like checkpoints: one without a manifest was being removed, or has lost it."""
        return sorted(int(p.name) for p in self._folder.iterdir() if _is_number(p.name)) if self._folder.is_dir() else []

    def save(self, step: int, params: Any, training: Any, progress: Mapping[str, Any]) -> None:
        """Saves a checkpoint in the background and drops those that are kept no longer.

        Args:
          step: its name.
          params: nested dict of NumPy arrays, not changed afterwards.
          training: pytree of NumPy arrays, the rest of what a run needs to go on.
          progress: plain values; `best_step` names the checkpoint to keep beside the latest.

        Of several processes all save together, each what it holds, and wait for it; arrays may then be global ones of JAX.
        """
        self.wait()
        if processes.number() == 1:
            self._pending = self._executor.submit(self._save, step, params, training, dict(progress))
        else:
            self._save(step, params, training, dict(progress))
            processes.wait_for_all(f"saved {step}")

    def wait(self) -> None:
        """Waits until the last save has ended.

        Raises:
          UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _save(self, step, params, training, progress):
        import orbax.checkpoint as ocp

        final, partial = self._folder / str(step), self._folder / f"{step}.partial"
        try:
            if processes.is_first():
                self._folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            with ocp.PyTreeCheckpointer() as writer:
                writer.save(partial / "params", params)
                writer.save(partial / "training", _flat(training))
            if not processes.is_first():
                return
            write_atomically(partial / "progress.json", json.dumps(progress))
            manifest = {"step": step, "shapes": shapes_of(params), "sha256": _hashes(partial)}
            write_atomically(partial / "manifest.json", json.dumps(manifest))
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
        except (OSError, ValueError, UserError) as error:  # tensorstore reports a full disk as a ValueError
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self._folder}: {error}; earlier ones are untouched"
            ) from None
        # what lies behind was passed over as damaged when training took up an earlier one
        keep = {*[earlier for earlier in self.steps() if earlier <= step][-2:], progress.get("best_step")}
        for old in self._numbered():
            if old not in keep:
                (self._folder / str(old) / "manifest.json").unlink(missing_ok=True)  # half-removed, it must not count
                shutil.rmtree(self._folder / str(old), ignore_errors=True)
        for left_over in self._folder.glob("*.partial"):  # by a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, in words; None if every file is as it was written, by a run of this model."""
        folder = self._folder / str(step)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            expected, shapes = dict(manifest["sha256"]), {name: tuple(shape) for name, shape in manifest["shapes"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "its manifest.json is missing or cannot be read"
        try:
            found = _hashes(folder)
        except OSError as error:
            return f"its files cannot be read: {error.strerror}"
        for name in {"progress.json": None, **expected}:
            if name not in found or name not in expected:
                return f"{name} is missing"
            if found[name] != expected[name]:
                return f"{name} is not as it was written"
        difference = None if self.shapes is None else _difference(self.shapes, shapes)
        return difference and f"it belongs to another model: {difference}"

    def latest_sound(self) -> int | None:
        """The latest undamaged checkpoint, with a warning for each damaged one that is passed over; None if there is none yet.

        Raises:
          UserError: there are checkpoints, but all are damaged.
          FileNotFoundError: one was replaced meanwhile, by a run that is in training.
        """
        reasons, before = [], self._numbered()
        for step in reversed(before):
            reason = self.damage(step)
            if reason is not None:
                self._check_unchanged(before)
            else:
                for passed in reasons:
                    log.warning("%s; the latest sound one is of step %d", passed, step)
                return step
            reasons.append(f"checkpoint {self._folder / str(step)} cannot be used ({reason})")
        if reasons:
            raise UserError(f"{'; '.join(reasons)}; there is no sound one to go on from: remove {self._folder} to train anew")
        return None

    def _check_unchanged(self, before):
        if self._numbered() != before:
            raise FileNotFoundError(f"{self._folder} holds other checkpoints than a moment ago")

    def choose(self, which: str) -> tuple[int, str]:
        """The step that "best" (on valid), "latest" or a number names, undamaged.

        Returns:
          The step, and what it is: "best", or another name where the best one was not asked for or not to be had.

        Raises:
          UserError: no such checkpoint; the sentence lists those there are.
          FileNotFoundError: they were replaced meanwhile, by a run that is in training.
        """
        steps, before = self.steps(), self._numbered()
        if not before:
            raise UserError(f"{self._folder.parent} has no checkpoint yet; train it first")
        if which == "latest":
            return self.latest_sound(), which
        if which == "best":
            latest = self.latest_sound()
            best = self.progress(latest)["best_step"]
            lost = best not in steps or self.damage(best)
            if lost or latest != before[-1]:
                self._check_unchanged(before)
            if best is None or latest != before[-1]:  # before the first look at valid; or a later one is damaged,
                return latest, "latest"  # and might have been better
            if lost:
                log.warning("the best checkpoint (step %s) is missing or damaged; the latest one is of step %d", best, latest)
                return latest, "latest"
            return best, which
        if not _is_number(which) or int(which) not in steps:
            raise UserError(f"--step={which} names no checkpoint; there are best, latest, {', '.join(map(str, steps))}")
        reason = self.damage(int(which))
        if reason:
            raise UserError(f"checkpoint {self._folder / which} cannot be used ({reason}); choose another --step")
        return int(which), which

    def progress(self, step: int) -> dict[str, Any]:
        """The plain values saved with a checkpoint."""
        return json.loads((self._folder / str(step) / "progress.json").read_text())

    def params(self, step: int) -> Any:
        """The parameters of a checkpoint: nested dict of NumPy arrays."""
        return self._restore(step, "params")

    def restore(self, step: int, params: Any, training: Any) -> tuple[Any, Any]:
        """What `save` was given at a step.

        Args:
          params, training: trees of arrays (or shapes) like those expected.

        Raises:
          UserError: the checkpoint is of a model or optimiser with other parameters; the first difference is named.
        """
        saved_params, saved_training = self.params(step), self._restore(step, "training")
        where = f"checkpoint {self._folder / str(step)}"
        check_like(params, saved_params, where)
        flat = _flat(training)
        difference = _difference(shapes_of(training), shapes_of(saved_training))
        if difference:  # though the model is the same, and its config
            raise UserError(f"{where} is of another version of the code, with which the run can go on: {difference}")
        leaves = [np.asarray(saved_training[name], leaf.dtype) for name, leaf in flat.items()]
        return saved_params, jax.tree.unflatten(jax.tree.structure(training), leaves)

    def _restore(self, step, item):
        import orbax.checkpoint as ocp

        try:
            with ocp.PyTreeCheckpointer() as reader:
                path = self._folder / str(step) / item
                saved = reader.metadata(path).item_metadata.tree
                # arrays that several processes have saved would come back on the devices that these had
                whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
                return reader.restore(path, restore_args=whole)
        except Exception as error:  # orbax and tensorstore raise many kinds for files that are not theirs
            raise UserError(f"checkpoint {self._folder / str(step)} cannot be read: {str(error).splitlines()[0]}") from None


def _is_number(name):
    return name.isascii() and name.isdigit()  # "²" is a digit as well


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of a tree of arrays, or of anything with shapes."""
    return {name: tuple(np.shape(leaf)) for name, leaf in _flat(tree).items()}


def check_like(expected: Any, found: Any, where: str) -> None:
    """Raises a UserError that names the first array which is missing, too many or of another shape.

    Args:
      expected, found: trees of arrays.
      where: what `found` is, for the sentence.
    """
    difference = _difference(shapes_of(expected), shapes_of(found))
    if difference:
        raise UserError(f"{where}: it belongs to another model: {difference}")


def _difference(here, there):
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            then, now = (shapes.get(name, "missing") for shapes in (there, here))
            return f"{name} is {then} there and {now} here"
    return None


def _flat(tree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _hashes(folder):
    return {
        str(path.relative_to(folder)): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / "manifest.json"
    }
