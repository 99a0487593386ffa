"""Placement: one device or pmap over several. The only place that knows device axes; outside it arrays are global."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.backend import give_back_freed_memory
from lm.config import Config
from lm.errors import UserError

_AXIS = "devices"


class _Compiled:
    """A function that is compiled when it first meets arguments of some shapes, and what the compiler leaves is given back.

    LLVM takes hundreds of MiB for a training step. In a jitted function's first call they would still be there when the
    step's own buffers come on top.
    """

    def __init__(self, jitted: Callable):
        self._jitted, self._programs = jitted, {}
        self._last: Callable | None = None

    def __call__(self, *args):
        if self._last is not None:
            try:
                return self._last(*args)
            except TypeError:  # how a program refuses arguments of other shapes, before it has touched them
                pass
        leaves, structure = jax.tree.flatten(args)
        shapes = structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        if shapes not in self._programs:
            self._programs[shapes] = self._jitted.lower(*args).compile()
            give_back_freed_memory()
        self._last = self._programs[shapes]
        return self._last(*args)

    def lower(self, *args):
        """As of a jitted function."""
        return self._jitted.lower(*args)


class Placement:
    """Where state and rows live, and how a step is compiled for that.

    State (parameters and all that belongs to them) is replicated; rows (batch and carry) are split in equal parts, in
    order. With one device nothing has a device axis and a step is compiled by `jit`; with several, by `pmap`.

    Attributes:
      num_devices: devices that the rows are split over.
    """

    def __init__(self, num_devices: int | None = None):
        """Takes the first `num_devices` devices; None: all.

        Raises:
          UserError: more devices than there are.
        """
        devices = jax.devices()
        if num_devices is not None and num_devices > len(devices):
            raise UserError(
                f"config.num_devices is {num_devices}, but JAX sees {len(devices)} device{'s' * (len(devices) > 1)} "
                f"({devices[0].platform}); set it to at most that, or on a CPU emulate more with "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={num_devices}"
            )
        self.devices = devices[:num_devices]
        self.num_devices = len(self.devices)
        self._sharding = NamedSharding(Mesh(np.array(self.devices), (_AXIS,)), PartitionSpec(_AXIS))

    def check_rows(self, num_rows: int, parts: int = 1) -> None:
        """Raises a UserError unless the rows split evenly over devices and, on each, into `parts` micro-batches."""
        unit = self.num_devices * parts
        if num_rows % unit:
            near = max(round(num_rows / unit), 1) * unit
            raise UserError(
                f"config.data.batch_size is {num_rows}, which {self.num_devices} devices"
                f"{f' × {parts} micro-batches' if parts > 1 else ''} do not divide; {near} would work"
            )

    def total(self, tree):
        """Sum over devices, inside a compiled step: psum under pmap, identity on one device."""
        return tree if self.num_devices == 1 else jax.lax.psum(tree, _AXIS)

    def compile(self, function: Callable, donate: tuple[int, ...] = ()) -> Callable:
        """Compiles a pure function of placed state and rows, which sees the local rows only.

        Args:
          function: its arguments and results are placed state or placed rows.
          donate: positions of arguments whose buffers may be reused.
        """
        if self.num_devices == 1:
            return _Compiled(jax.jit(function, donate_argnums=donate))
        return _Compiled(jax.pmap(function, axis_name=_AXIS, devices=self.devices, donate_argnums=donate))

    def put_state(self, tree):
        """A global tree, replicated."""
        if self.num_devices == 1:
            return jax.device_put(tree, self.devices[0])
        return jax.device_put(jax.tree.map(lambda x: np.broadcast_to(x, (self.num_devices, *np.shape(x))), tree), self._sharding)

    def get_state(self, tree) -> Any:
        """The global tree of a replicated one, as NumPy arrays of their own."""
        if self.num_devices > 1:
            tree = jax.tree.map(lambda x: x.addressable_shards[0].data, tree)
        host = jax.device_get(tree)
        # On a CPU, device_get may hand out a view of a buffer that a later step donates, hence the copy.
        return jax.tree.map(lambda x: np.array(x[0] if self.num_devices > 1 else x), host)

    def put_rows(self, tree):
        """A global tree whose leaves have rows on axis 0, split over the devices."""
        if self.num_devices == 1:
            return jax.device_put(tree, self.devices[0])
        split = jax.tree.map(lambda x: np.reshape(x, (self.num_devices, -1, *np.shape(x)[1:])), tree)
        return jax.device_put(split, self._sharding)

    def get_rows(self, tree) -> Any:
        """The global tree of split rows, as NumPy arrays of their own."""
        host = jax.device_get(tree)
        if self.num_devices == 1:
            return jax.tree.map(np.array, host)
        return jax.tree.map(lambda x: np.array(x).reshape(-1, *x.shape[2:]), host)


def place(config: Config, or_fewer: bool = False) -> Placement:
    """The placement that `config.parallelism` names, over `config.num_devices` devices.

    Args:
      or_fewer: take all devices there are where the config asks for more.

    Raises:
      UserError: fewer devices than the config asks for.
    """
    wanted = config.num_devices
    if or_fewer and wanted is not None:
        wanted = min(wanted, len(jax.devices()))
    return {"pmap": Placement}[config.parallelism](wanted)


def device_summary(placement: Placement) -> dict[str, Any]:
    """What a person wants to know of the devices: platform, kind, number."""
    first = placement.devices[0]
    return {"platform": first.platform, "device": first.device_kind, "num_devices": placement.num_devices, "jax": jax.__version__}


def peak_bytes(placement: Placement) -> int | None:
    """Most memory in use so far on the first device, in bytes; None where the platform does not tell."""
    statistics = placement.devices[0].memory_stats()
    return statistics.get("peak_bytes_in_use") if statistics else None


def split_rows(tree, parts: int):
    """Rows [B, ...] as [parts, B / parts, ...], for a scan over micro-batches."""
    return jax.tree.map(lambda x: jnp.reshape(x, (parts, x.shape[0] // parts, *x.shape[1:])), tree)


def join_rows(tree):
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), tree)
