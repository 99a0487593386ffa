"""The processes of one job, each with devices of its own: how they meet, agree, and which of them writes. One pays nothing."""

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm.errors import UserError

Result = TypeVar("Result")

_LONGEST_SENTENCE = 4096  # bytes


def join(coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Meets the other processes of the job; before anything else is asked of JAX.

    Args:
      coordinator_address: "host:port" of the first process.
      num_processes, process_id: how many there are, and which of them this is, from 0. All None: the scheduler tells (SLURM,
        Cloud TPU, GKE).

    Raises:
      UserError: they did not meet.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"the processes of this job did not meet ({' '.join(str(error).split())}); start the same command on every host, or "
            "give --coordinator_address=HOST:PORT, --num_processes and --process_id"
        ) from None


def number() -> int:
    """How many processes the job has."""
    return jax.process_count()


def index() -> int:
    """Which of them this is, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this is the one that writes what only one may write."""
    return index() == 0


def in_turn(function: Callable[[], Result]) -> Result:
    """What a function gives, called in the first process before all others, so that these find what it has put on disk.

    Args:
      function: called once in each process; whatever it does in one alone, it must not wait for another.

    Raises:
      UserError: it did so in any process; then in all.
    """
    if number() == 1:
        return function()
    for turn_of_first in (True, False):
        sentence = ""
        if is_first() == turn_of_first:
            try:
                result = function()
            except UserError as error:
                sentence = str(error)
        told = [
            bytes(text).rstrip(b"\0").decode(errors="ignore") for text in multihost_utils.process_allgather(_padded(sentence))
        ]
        if any(told):
            raise UserError(next(filter(None, told)))
    return result


def _padded(sentence):
    text = np.frombuffer(sentence.encode()[:_LONGEST_SENTENCE], np.uint8)
    return np.pad(text, (0, _LONGEST_SENTENCE - len(text)))


def differing(values: Mapping[str, str]) -> list[str]:
    """Names of the texts that are not the same in all processes, each of which has all names."""
    if number() == 1:
        return []
    own = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in values.values()])
    same = (multihost_utils.process_allgather(own) == own).all(axis=(0, 2))
    return [name for name, is_same in zip(values, same, strict=True) if not is_same]


def agreed(value: int) -> int:
    """The first process's value, in all; it must fit into 32 bits."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait_for_all(where: str) -> None:
    """Returns when every process has come here."""
    if number() > 1:
        multihost_utils.sync_global_devices(where)


def are_asked_to_stop(step: int, alone: Callable[[], bool]) -> bool:
    """Whether to stop after this step; to be asked at every step.

    Args:
      step: just done, from 1.
      alone: decides for a process that has no others. Several stop, all after the same step, when any was sent SIGTERM.
    """
    return alone() if number() == 1 else multihost_utils.reached_preemption_sync_point(step)


def all_rows(tree):
    """Every process's rows, axis 0 of NumPy or global arrays, in the order of the processes, as NumPy arrays."""
    return multihost_utils.process_allgather(tree, tiled=True)
