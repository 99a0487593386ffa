"""The machine a measurement is held against: its matmul peak, its memory; and what several rounds say together."""

import os
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.parallel import Placement


class Matmul:
    """What this machine makes of rows times a big square matrix, on all devices at once.

    With as many rows as columns that is the practical peak of its arithmetic; with few rows, of its memory, from which each
    entry of the matrix is then read for few operations.

    Attributes:
      rows, size: [rows, size] by [size, size].
    """

    def __init__(
        self,
        placement: Placement,
        dtype: str,
        precision: str = "default",
        rows: int | None = None,
        size: int | None = None,
    ):
        """Compiles it and runs it once.

        Args:
          precision: of jax.numpy.matmul, where an accelerator rounds what it multiplies.
          rows: at most as many as columns, and None is as many.
          size: None is 8192, and on a CPU 2048, or 4096 where rows are given: 64 MiB, more than most caches hold.
        """
        on_cpu = placement.devices[0].platform == "cpu"
        self.size, self._in_a_row = size or ((2048 if rows is None else 4096) if on_cpu else 8192), 1 if on_cpu else 100
        self.rows = self.size if rows is None else min(rows, self.size)
        placement = Placement(placement.num_devices)  # a product on each device, also where the state is split
        self._num_devices = placement.num_devices
        matrix = np.random.default_rng(0).standard_normal((self.size, self.size), np.float32).astype(jnp.dtype(dtype))
        self._factors = placement.put_state((matrix[: self.rows], matrix))
        self._product = placement.compile(lambda x, y: (jnp.matmul(x, y, precision=precision),), ("state",))
        jax.block_until_ready(self._product(*self._factors))

    def rate(self, repetitions: int = 3) -> float:
        """Floating-point operations per second of the fastest of some repetitions.

        An accelerator gets a hundred products in a row, or the way there and back would count in each.
        """
        durations = []
        for _ in range(repetitions):
            started = time.perf_counter()
            for _ in range(self._in_a_row):
                product = self._product(*self._factors)
            jax.block_until_ready(product)
            durations.append(time.perf_counter() - started)
        return self._in_a_row * self._num_devices * 2 * self.rows * self.size**2 / min(durations)


def busy_cores(seconds: float = 1.0) -> float:
    """How many cores all processes keep busy while this one waits; where there is no /proc/stat, the load of the last minute.

    The load average alone would still show what a measurement before this one did.
    """
    statistics_file = pathlib.Path("/proc/stat")
    if not statistics_file.exists():
        return os.getloadavg()[0]

    def idle_and_total():
        user, nice, system, idle, waiting, *interrupts = map(int, statistics_file.read_text().split("\n", 1)[0].split()[1:9])
        return idle + waiting, user + nice + system + idle + waiting + sum(interrupts)

    idle, total = idle_and_total()
    time.sleep(seconds)
    idle_after, total_after = idle_and_total()
    return round((os.cpu_count() or 1) * (1 - (idle_after - idle) / max(total_after - total, 1)), 2)


def spread(values: Sequence[float], digits: int) -> dict[str, Any]:
    """Median, minimum, maximum, and the values one by one, rounded."""
    values = [round(value, digits) for value in values]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}
