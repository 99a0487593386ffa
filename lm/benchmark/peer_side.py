"""The other side of a comparison in a process of its own, which loads the peer's library, and of ours no more than it needs."""

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lm.allocator import keep_freed_memory
from lm.benchmark.units import Generation, host_peak_bytes
from lm.config import Config
from lm.config.stored import load_resolved

_MOST_TOKENS = 2_000_000  # of the batches that are handed over


class Batch(NamedTuple):
    """As much of lm.data.batches.Batch as a peer needs."""

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    reset_B: np.ndarray


class Batches:
    """The first batches of a source, as many as make two million tokens; after the last it begins anew.

    Attributes:
      eos: what stands before the first token of a text.
      steps_per_epoch: of the whole source.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], eos: int, steps_per_epoch: Any):
        self._inputs, self._targets, self._resets = (arrays[name] for name in Batch._fields)
        self.eos, self.steps_per_epoch = eos, steps_per_epoch

    @staticmethod
    def take(source: Any) -> dict[str, np.ndarray]:
        """The arrays of a source (lm.data.batches.BatchSource)."""
        first = source.batch(0, slice(None))
        number = max(1, min(int(source.steps_per_epoch), _MOST_TOKENS // first.inputs_BT.size))
        batches = [source.batch(step, slice(None)) for step in range(number)]
        return {name: np.stack([getattr(batch, name) for batch in batches]) for name in Batch._fields}

    def batch(self, step: int, rows: slice) -> Batch:
        """As of a BatchSource."""
        place = step % len(self._inputs)  # the first, which begins an epoch, empties the state
        return Batch(self._inputs[place][rows], self._targets[place][rows], self._resets[place][rows])


class Start(NamedTuple):
    """Where a peer starts from: what ours wrote to a file, and what it is to do.

    Attributes:
      config: resolved, its widths solved; as JSON.
      arrays: parameters by path, batches by name and the learning rates of the first steps, after which they begin anew.
    """

    mode: str
    config: Mapping[str, Any]
    vocab_size: int
    eos: int
    steps_per_epoch: Any
    generation: Generation
    arrays: pathlib.Path

    def read(self) -> tuple[Config, dict[str, Any], Batches, np.ndarray]:
        """Config, parameters, batches and learning rates."""
        with np.load(self.arrays) as file:
            arrays = dict(file)
        learning_rates = arrays.pop("learning_rates")
        batches = Batches({name: arrays.pop(name) for name in Batch._fields}, self.eos, self.steps_per_epoch)
        params: dict[str, Any] = {}
        for path, value in arrays.items():
            *parents, name = path.split("/")
            place = params
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = value
        return load_resolved(self.config, self.config), params, batches, learning_rates


class PeerSide:
    """The peer, in its process."""

    def __init__(self, name: str, start: Start, allocator: str, platform: str, compiled: bool):
        """Builds the model.

        Args:
          name: of lm.benchmark, without "_peer".
          allocator, platform: of ours; "tuned" here is what keeps freed memory.
          compiled: whether it runs compiled, as far as the peer has the choice.
        """
        if allocator == "tuned":
            keep_freed_memory()
        self._peer = importlib.import_module(f"lm.benchmark.{name}_peer").start(start, platform, compiled)

    def compiled_is_faster(self) -> bool:
        """Tries both, in turns; of a peer that has the choice."""
        return self._peer.compiled_is_faster()

    def first_unit(self) -> dict[str, Any]:
        """The loss of the first batch, the seconds of the first unit, and the library's version."""
        return {"first_loss": self._peer.first_loss(), "seconds": self._peer.run(1)[0], **self._peer.versions}

    def run(self, num_units: int) -> tuple[float, float]:
        """As `Workload.run`."""
        return self._peer.run(num_units)

    def memory(self) -> dict[str, int | None]:
        """Peaks so far, in bytes: of the process, and of the device."""
        return {"host_peak_bytes": host_peak_bytes(), "device_peak_bytes": self._peer.device_peak_bytes()}

    def close(self) -> None:
        """Ends the peer's threads."""
        self._peer.close()
