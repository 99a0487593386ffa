"""What both sides of a comparison share: units of work and what they are measured by. Without JAX, which a peer does not load."""

import contextlib
import dataclasses
import itertools
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Generation:
    """What is generated: rows side by side, and the tokens of each."""

    num_samples: int = 1
    num_tokens: int = 256


class Timed:
    """An iterator over another, and how long it has been waited for.

    Attributes:
      seconds: of waiting so far.
    """

    def __init__(self, iterator: Iterator[Any]):
        self._iterator, self.seconds = iterator, 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        asked = time.perf_counter()
        try:
            return next(self._iterator)
        finally:
            self.seconds += time.perf_counter() - asked


def run_on(batches: Iterator[Any], num_units: int, work: Callable[[Iterator[Any]], Any]) -> tuple[float, float]:
    """Works on the next batches until it is done with them; returns all seconds, and those of waiting for batches."""
    timed, started = Timed(itertools.islice(batches, num_units)), time.perf_counter()
    work(timed)
    return time.perf_counter() - started, timed.seconds


def host_peak_bytes() -> int:
    """The most memory that this process has held so far, its libraries included.

    Linux hands the figure of `getrusage` down to processes that are started; that of /proc is a process's own.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
