"""The machine a measurement is held against: its matmul peak, its memory; and what several rounds say together."""

import math
import os
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.models.products import times
from lm.parallel import Placement


class Matmul:
    """What this machine makes of rows times a big matrix, on all devices at once.

    With as many rows as columns that is the practical peak of its arithmetic; with few rows, of its memory, from which each
    entry of the matrix is then read for few operations.

    Attributes:
      rows, size, width: [rows, size] by [size, width].
    """

    def __init__(
        self,
        placement: Placement,
        dtype: str,
        precision: str = "default",
        rows: int | None = None,
        numbers: int | None = None,
    ):
        """Compiles it and runs it once.

        Args:
          precision: of jax.numpy.matmul, where an accelerator rounds what it multiplies.
          rows: None is as many as the matrix has, which is square then; else it is four times as wide as high, since a CPU reads
            long rows faster.
          numbers: in the matrix, about; None is 8192², and on a CPU 2048².
        """
        on_cpu = placement.devices[0].platform == "cpu"
        side, self._in_a_row = math.sqrt(numbers or (2048**2 if on_cpu else 8192**2)), 1 if on_cpu else 100
        self.size = round(side) if rows is None else 2 * math.ceil(side / 4)
        self.rows, self.width = rows or self.size, self.size if rows is None else 4 * self.size
        placement = Placement(placement.num_devices)  # a product on each device, also where the state is split
        self._num_devices = placement.num_devices
        random = np.random.default_rng(0)
        shapes = (self.rows, self.size), (self.size, self.width)
        self._factors = placement.put_state([random.standard_normal(s, np.float32).astype(jnp.dtype(dtype)) for s in shapes])
        self._product = placement.compile(lambda x, y: (times(x, y, precision=precision),), ("state",))
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
        return self._in_a_row * self._num_devices * 2 * self.rows * self.size * self.width / min(durations)


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
