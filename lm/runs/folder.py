"""A run's folder: where its files stand, its lock, its config and its metrics."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from lm.config import Config, differences, load_resolved, to_json, with_places
from lm.errors import UserError
from lm.files import read_json, write_atomically, write_json

log = logging.getLogger(__name__)


class RunFolder:
    """The files of one run (`--workdir`). Reading needs nothing more; training writes inside `with folder.locked():`."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.evaluation = self.path / "evaluation"

    def locked(self) -> "_Lock":
        """A context in which no other process may write the run.

        Raises:
          UserError: on entry, a folder that cannot be written or is in use.
        """
        return _Lock(self.path)

    @property
    def has_checkpoints(self) -> bool:
        """Whether there are any, sound or not."""
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def read_config(self) -> tuple[Config, dict[str, Any]]:
        """The resolved config and all of config.json.

        Raises:
          UserError: there is no run in this folder, or its config cannot be read.
        """
        instead = "put it back: there are checkpoints" if self.has_checkpoints else "train one there first"
        saved = read_json(self.config, f"{self.path} holds no run: there is no config.json; {instead}")
        try:
            return load_resolved(saved["resolved"], saved["given"]), saved
        except (KeyError, TypeError, AttributeError) as error:
            lost = f"it has no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{self.config} is damaged: {lost}") from None
        except UserError as error:
            raise UserError(f"{self.config} is damaged, or of another version of the code: {error}") from None

    def write_config(self, given: Config, resolved: Config, facts: dict[str, Any]) -> None:
        """Writes config.json: the config as given and as resolved, and facts that follow from it and the data."""
        write_json(self.config, {"given": to_json(given), "resolved": to_json(resolved), **facts})

    def note_places(self, draft: Config) -> None:
        """Notes where the corpus and caches of a run that has ended stand now, as a config says that trains it again."""
        _, saved = self.read_config()
        moved = {**saved, **{form: with_places(saved[form], draft) for form in ("given", "resolved")}}
        if moved != saved:
            write_json(self.config, moved)

    def check_same_experiment(self, resolved: Config, facts: dict[str, Any]) -> None:
        """Raises a UserError, naming the fields, if this folder's run was started with another config or on other text, or if
        nothing tells with which; a folder without a run is fine."""
        if not self.config.exists():
            if self.has_checkpoints:
                raise UserError(
                    f"{self.path} has checkpoints but no config.json, which says what they are of; put it back, or use another "
                    "--workdir"
                )
            return
        old, saved = self.read_config()
        found = differences(old, resolved)
        for name, value in facts.items():
            if saved.get(name) == value:
                continue
            if name == "splits":
                changed = [split for split, digest in value.items() if (saved.get(name) or {}).get(split) != digest]
                found.append(f"the text of {', '.join(changed)} has changed")
            elif name == "tokenizer_sha256":
                found.append("its tokenizer.json has changed")
            else:
                found.append(f"{name}: {saved.get(name)} then, {value} now")
        if found:
            raise UserError(
                f"{self.path} holds another experiment ({'; '.join(found)}); use another --workdir, or go back to its settings"
            )

    def write_environment(self, devices: dict[str, Any], goes_on: bool = False) -> None:
        """Writes environment.json: versions, devices, commit, command, date.

        Args:
          goes_on: whether a run is taken up: then what it ran in until now is kept, under `earlier`, where that was another.
        """
        now, before = {**environment(), **devices}, {}
        if goes_on:
            with contextlib.suppress(UserError):  # lost or damaged
                before = read_json(self.environment, "")
        earlier = before.pop("earlier", [])
        if any(before.get(name) != value for name, value in now.items() if name not in ("date", "command")) and before:
            earlier = [*earlier, {name: value for name, value in before.items() if name != "command"}]
        write_json(self.environment, {**now, **({"earlier": earlier} if earlier else {})})

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"{self.metrics} cannot be written: {error.strerror}") from None

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl, each with its split, step, tokens and seconds; a last one that was cut short is left out.

        Raises:
          UserError: another line is damaged.
        """
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("it is no JSON object")
                kinds = {"split": str, "step": int, "tokens": int, "seconds": int | float}
                wrong = [name for name, kind in kinds.items() if not isinstance(record[name], kind)]
                if wrong:
                    raise ValueError(f"{wrong[0]} is {record[wrong[0]]!r}")
            except (ValueError, KeyError) as error:
                if number == len(lines):
                    return
                lost = f"it has no {error}" if isinstance(error, KeyError) else error
                raise UserError(
                    f"{self.metrics} is damaged in line {number} ({lost}); mend that line or take it out, and the run goes on"
                ) from None
            yield record

    def cut_metrics(self, step: int) -> list[dict[str, Any]]:
        """Takes metrics.jsonl back to what stood there at a step, and returns it, with a warning if there is no such file."""
        if step > 0 and not self.metrics.exists():
            log.warning("%s is gone: what it told of the steps until %d is lost", self.metrics, step)
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        return kept


class _Lock:
    def __init__(self, path):
        self._path = path

    def __enter__(self):
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._file = (self._path / ".lock").open("a+")
        except FileExistsError:
            raise UserError(f"--workdir {self._path} is a file; give a folder") from None
        except OSError as error:
            raise UserError(f"--workdir {self._path} cannot be written ({error.strerror}); give a folder that can be") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(
                f"--workdir {self._path} is in use by another run ({holder}); wait for it or use another folder"
            ) from None
        with contextlib.suppress(OSError):  # on a full disk it is locked all the same
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {platform.node()}")
            self._file.flush()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._file.truncate(0)
            self._file.close()


def environment() -> dict[str, Any]:
    """What ran here: versions, machine, commit, command, date."""
    import flax
    import jax
    import numpy
    import optax

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": _commit(),
        "hardware": f"{_processor()}, {_num_cores()} {'core' if _num_cores() == 1 else 'cores'}",
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (jax, flax, optax, numpy)},
    }


def _processor(cpuinfo=pathlib.Path("/proc/cpuinfo")):
    """Its name, and where that is told the width of its vectors: a rented one's name may be its maker's alone."""
    try:
        lines = (line.partition(":")[::2] for line in cpuinfo.read_text().splitlines())
        told = {name.strip(): value.strip() for name, value in lines}
    except OSError:
        told = {}
    name, flags = told.get("model name") or platform.processor() or platform.machine(), told.get("flags", "").split()
    vectors = next((shown for flag, shown in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), None)
    return f"{name} with {vectors}" if vectors else name


def _num_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _commit():
    def git(*arguments):
        here = pathlib.Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        results = (f":(top,exclude)lm/{part}/results" for part in ("benchmark", "reporting"))  # what is being written is no code
        changes = git("status", "--porcelain", "--", ":/", *results)
        return git("rev-parse", "HEAD")[:12] + (" with changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None
