"""Trains for long, with looks at valid and checkpoints, and watches what grows: python tests/soak.py --minutes=30

After each look it notes resident memory, open files, threads and how often the compiler has run; a save that is under way is
waited for, since it holds up to ten files and three threads that it gives back. What grows with time would stop a run of days.
The suite has a short form (tests/test_soak.py).
"""

import argparse
import contextlib
import json
import os
import pathlib
import tempfile
import threading
import time
from typing import NamedTuple

import numpy as np

from lm.config import Config
from lm.errors import Preempted
from lm.runs.folder import RunFolder
from lm.training.train import Listener, train


class Seen(NamedTuple):
    """What there was after a look at valid: seconds since the start, MiB, numbers."""

    step: int
    seconds: float
    resident: float
    files: int
    threads: int
    compilations: int


class Watch(Listener):
    """Notes what there is after each look at valid, and asks to stop after some seconds."""

    def __init__(self, workdir: str, seconds: float, told=lambda seen: None):
        import jax.monitoring

        self._checkpoints = RunFolder(workdir).checkpoints
        self.seen: list[Seen] = []
        self._compilations, self._told = 0, told
        self._started, self._seconds = time.monotonic(), seconds
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event, duration, **_):
        del duration
        self._compilations += event == "/jax/core/compile/backend_compile_duration"

    def recorded(self, line):
        if line["split"] == "valid":
            while any(self._checkpoints.glob("*.partial")):
                time.sleep(0.01)
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            files, seconds = len(os.listdir("/proc/self/fd")), time.monotonic() - self._started
            self.seen.append(Seen(line["step"], seconds, resident, files, threading.active_count(), self._compilations))
            self._told(self.seen[-1])

    def is_asked_to_stop(self):
        return time.monotonic() - self._started > self._seconds


def soak(draft: Config, workdir: str, seconds: float, told=lambda seen: None) -> list[Seen]:
    """Trains for so long, however many steps that makes."""
    watch = Watch(workdir, seconds, told)
    with contextlib.suppress(Preempted):
        train(draft, workdir, watch)
    return watch.seen


def slope(seen: list[Seen]) -> tuple[float, float]:
    """MiB an hour that resident memory grows by, and its standard error, by least squares over the second half of the looks."""
    later = seen[len(seen) // 2 :]
    hours = np.array([one.seconds for one in later]) / 3600
    resident = np.array([one.resident for one in later])
    design = np.stack([hours, np.ones_like(hours)], axis=1)
    fitted, *_ = np.linalg.lstsq(design, resident, rcond=None)
    rest = resident - design @ fitted
    error = np.sqrt(rest @ rest / max(len(later) - 2, 1) / np.sum((hours - hours.mean()) ** 2))
    return float(fitted[0]), float(error)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--architecture", default="lstm", choices=["rnn", "gru", "lstm", "transformer"])
    parser.add_argument("--json", default=None, help="also write what was seen to this file")
    options = parser.parse_args()
    from lm import backend

    backend.start()
    draft = Config()
    draft.model.architecture, draft.model.hidden_dim, draft.model.dropout_rate = options.architecture, 128, 0.1
    draft.data.order = "windows" if options.architecture == "transformer" else "stream"
    draft.training.num_steps, draft.training.evaluate_every_steps = 10**9, 100
    draft.training.checkpoint_every_steps, draft.training.log_every_steps = 25, 10
    with tempfile.TemporaryDirectory() as workdir:
        seen = soak(draft, workdir, options.minutes * 60, lambda one: print(one, flush=True))
    grown, error = slope(seen)
    first, last = seen[0], seen[-1]
    print(
        f"{last.step:,} steps, {len(seen)} looks in {last.seconds / 60:.1f} min; resident {first.resident:.0f} MiB after the "
        f"first look, {last.resident:.0f} after the last, {grown:+.1f} ± {error:.1f} MiB an hour over the second half; files "
        f"{first.files} and {last.files}; threads {first.threads} and {last.threads}; compilations after the first look "
        f"{last.compilations - first.compilations}"
    )
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps([one._asdict() for one in seen]))


if __name__ == "__main__":
    main()
