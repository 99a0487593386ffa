"""Placement: one device, pmap over several, or a mesh. The only place that knows device axes; outside it arrays are global."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm import processes
from lm.allocator import give_back_freed_memory
from lm.config import Config
from lm.errors import UserError
from lm.partition import ALL_ROWS, HEADS, ROWS, VOCABULARY, WIDTH, Partition, use as use_partition

_AXIS = "devices"  # of pmap
_DATA, _FSDP, _TENSOR = "data", "fsdp", "tensor"  # of a mesh


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
    order. With one device nothing has a device axis and a step is compiled by `jit`; with several, by `pmap`. Of several
    processes each holds the parts of its own devices; all must call what is said to be global together.

    Attributes:
      devices, num_devices: those in use, of all processes.
      num_row_parts: into how many parts the rows are split.
    """

    def __init__(self, num_devices: int | None = None, asked_for: str = "num_devices"):
        """Takes the first `num_devices` devices; None: all.

        Args:
          asked_for: the field of the config that names the number.

        Raises:
          UserError: more devices than there are, or only some of those of several processes.
        """
        devices = sorted(jax.devices(), key=lambda device: device.process_index)
        if num_devices is not None and num_devices > len(devices):
            raise UserError(
                f"config.{asked_for} is {num_devices}, but JAX sees {len(devices)} device{'s' * (len(devices) > 1)} "
                f"({devices[0].platform}); set it to at most that, or on a CPU emulate more with "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={num_devices}"
            )
        if num_devices is not None and num_devices < len(devices) and processes.number() > 1:
            raise UserError(
                f"config.{asked_for} is {num_devices}, but the {processes.number()} processes have {len(devices)} devices; "
                f"several processes use all they have: make it {len(devices)}, or none"
            )
        self.devices = devices[:num_devices]
        self.num_devices = self.num_row_parts = len(self.devices)
        self._sharding = NamedSharding(Mesh(np.array(self.devices), (_AXIS,)), PartitionSpec(_AXIS))

    def check_rows(self, num_rows: int, parts: int = 1) -> None:
        """Raises a UserError unless the rows split evenly over devices and, on each, into `parts` micro-batches."""
        unit = self.num_row_parts * parts
        if num_rows % unit:
            near = max(round(num_rows / unit), 1) * unit
            raise UserError(
                f"config.data.batch_size is {num_rows}, which {self.num_row_parts} devices"
                f"{f' × {parts} micro-batches' if parts > 1 else ''} do not divide; {near} would work"
            )

    def total(self, tree):
        """Sum over devices, inside a compiled step: psum under pmap, identity on one device."""
        return tree if self.num_devices == 1 else jax.lax.psum(tree, _AXIS)

    def compile(self, function: Callable, results: tuple[str, ...], donate: tuple[int, ...] = ()) -> Callable:
        """Compiles a pure function of placed state and rows, which sees the local rows only.

        Args:
          function: its arguments are placed state or placed rows, its result a tuple of such.
          results: of each result, whether it is "state" or "rows".
          donate: positions of arguments whose buffers may be reused.
        """
        del results  # of one device, or by pmap's axis, both lie as they should
        if self.num_devices == 1:
            return _Compiled(jax.jit(function, donate_argnums=donate))
        return _Compiled(jax.pmap(function, axis_name=_AXIS, devices=self.devices, donate_argnums=donate))

    def make_state(self, function: Callable, *trees) -> Any:
        """The global tree that a function makes of global trees, such as `put_state` takes, each part where it will lie.

        What is split over many devices need not be held by one first. The program that makes it is needed once and not kept,
        nor is what it made random numbers in.
        """
        made = _Compiled(jax.jit(lambda *trees: function(*trees)))(*trees)
        give_back_freed_memory()
        return made

    def put_state(self, tree):
        """A global tree, replicated."""
        if self.num_devices == 1:
            return jax.device_put(tree, self.devices[0])
        return _put(jax.tree.map(lambda x: np.broadcast_to(x, (self.num_devices, *np.shape(x))), tree), self._sharding)

    def get_state(self, tree) -> Any:
        """The global tree of a replicated one, as NumPy arrays of their own."""
        if self.num_devices == 1:
            return _whole(tree)
        copies = _whole(jax.tree.map(lambda x: x.addressable_shards[0].data, tree))
        return jax.tree.map(lambda x: x.reshape(x.shape[1:]), copies)  # x[0] would make a scalar of what is an array

    def to_save(self, tree) -> Any:
        """The global tree of a placed one, as checkpoints take it: as `get_state` gives it, or arrays of which each process
        has a part."""
        return self.get_state(tree)

    def state_like(self, tree) -> Any:
        """Shapes, types and places of what `put_state` makes of a tree of arrays or shapes, to compile for."""
        lead = () if self.num_devices == 1 else (self.num_devices,)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), tree)

    def state_bytes(self, like) -> int:
        """Bytes on each device of what `state_like` tells of."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like)) // self.num_devices

    def put_rows(self, tree):
        """A global tree whose leaves have rows on axis 0, split over the devices."""
        if self.num_devices == 1:
            return jax.device_put(tree, self.devices[0])
        return _put(jax.tree.map(lambda x: np.reshape(x, (self.num_devices, -1, *np.shape(x)[1:])), tree), self._sharding)

    def local_rows(self, num_rows: int) -> slice:
        """Which of a global batch's rows this process holds."""
        each, mine = num_rows // self.num_devices, _held(self._sharding, self.num_devices)
        return slice(each * mine.start, each * mine.stop)

    def put_local_rows(self, tree):
        """As `put_rows`, of a tree that has only the rows which this process holds."""
        if self.num_devices == 1:
            return self.put_rows(tree)
        mine = _held(self._sharding, self.num_devices)
        split = jax.tree.map(lambda x: np.reshape(x, (mine.stop - mine.start, -1, *np.shape(x)[1:])), tree)
        return _put_held(split, self._sharding, self.num_devices)

    def get_rows(self, tree) -> Any:
        """The global tree of split rows, as NumPy arrays of their own."""
        host = _whole(tree)
        return host if self.num_devices == 1 else jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), host)


# How parameters, and what an optimiser keeps for each, are split: the end of a path -> for each dimension the axis that
# splits it. What an axis does not divide is split along another dimension if it can be, else whole on each of its devices.
_RULES = (
    (r"embedding/table(_\d+)?", (_TENSOR, _FSDP)),
    (r"output/kernel", (_FSDP, _TENSOR)),
    (r"(query|key|value|inward|gate)/kernel", (_FSDP, _TENSOR)),
    (r"outward/kernel", (_TENSOR, _FSDP)),
    (r"(input|recurrent)_kernel", (_FSDP, _TENSOR)),
    (r".*", (_TENSOR,)),  # vectors, and all the rest
)


class Sharded(Placement):
    """A mesh of data × fsdp × tensor devices: `jit` over global arrays, which the compiler divides.

    Rows are split over data and fsdp, state over fsdp and tensor (fully sharded data parallelism: Rajbhandari et al. 2020,
    arXiv:1910.02054; tensor parallelism: Shoeybi et al. 2019, arXiv:1909.08053). A recurrence splits its rows over tensor as
    well, so that no step of it waits for another device; attention its heads; the loss its vocabulary.

    Attributes:
      num_row_parts: data × fsdp.
    """

    def __init__(self, mesh_shape: tuple[int, int, int], asked_for: str = "mesh_shape's product"):
        """Takes as many devices as the shape has.

        Args:
          asked_for: as in `Placement`.

        Raises:
          UserError: there are fewer.
        """
        super().__init__(math.prod(mesh_shape), asked_for)
        self._mesh = Mesh(np.array(self.devices).reshape(mesh_shape), (_DATA, _FSDP, _TENSOR))
        self._partition = Partition(
            self._mesh,
            {
                ROWS: (_DATA, _FSDP),
                ALL_ROWS: (_DATA, _FSDP, _TENSOR),
                VOCABULARY: (_TENSOR,),
                HEADS: (_TENSOR,),
                WIDTH: (_TENSOR,),
            },
        )
        self.num_row_parts = self._partition.size(self._partition.axes[ROWS])
        self._rows = NamedSharding(self._mesh, PartitionSpec((_DATA, _FSDP)))

    def total(self, tree):
        return tree  # the sums of a global program are those of all devices

    def compile(self, function, results, donate=()):
        def constrained(*args):
            with use_partition(self._partition):
                found = function(*args)
            shardings = tuple(
                self._state_shardings(tree) if kind == "state" else jax.tree.map(lambda _: self._rows, tree)
                for tree, kind in zip(found, results, strict=True)
            )
            return jax.lax.with_sharding_constraint(found, shardings)

        return _Compiled(jax.jit(constrained, donate_argnums=donate))

    def make_state(self, function, *trees):
        made = self.compile(lambda *trees: (function(*trees),), ("state",))(*map(self.put_state, trees))[0]
        give_back_freed_memory()
        return made

    def put_state(self, tree):
        return _put(tree, self._state_shardings(tree))

    def get_state(self, tree):
        return _whole(tree)

    def to_save(self, tree):
        return self.get_state(tree) if processes.number() == 1 else tree

    def state_like(self, tree):
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, self._state_shardings(tree)
        )

    def state_bytes(self, like):
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(like))

    def put_rows(self, tree):
        return _put(tree, self._rows)

    def local_rows(self, num_rows):
        return _held(self._rows, num_rows)

    def put_local_rows(self, tree):
        return _put_held(tree, self._rows, self.num_row_parts)

    def get_rows(self, tree):
        return self.get_state(tree)

    def _state_shardings(self, tree):
        def sharding(spec):
            return NamedSharding(self._mesh, spec)

        return jax.tree.map(sharding, state_specs(tree, self._mesh.shape), is_leaf=lambda x: isinstance(x, PartitionSpec))


def mesh_sizes(mesh_shape: tuple[int, int, int]) -> dict[str, int]:
    """The devices along each axis of a mesh, by its name."""
    return dict(zip((_DATA, _FSDP, _TENSOR), mesh_shape, strict=True))


def state_specs(tree, sizes: Mapping[str, int]):
    """Which axes of a mesh split each dimension of each piece of state, by its path and shape.

    Args:
      tree: of arrays or shapes.
      sizes: devices along each axis.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _spec(jax.tree_util.keystr(path, simple=True, separator="/"), np.shape(leaf), sizes), tree
    )


def _spec(name, shape, sizes):
    rule = next(axes for pattern, axes in _RULES if re.search(rf"(^|/)({pattern})$", name))
    split: list[tuple[str, ...]] = [() for _ in shape]
    for axis in (_TENSOR, _FSDP):
        first = rule.index(axis) if axis in rule else 0
        for dimension in sorted(range(len(shape)), key=lambda d: d != first):
            if shape[dimension] and shape[dimension] % math.prod(sizes[one] for one in (*split[dimension], axis)) == 0:
                split[dimension] += (axis,)
                break
    return PartitionSpec(*(axes or None for axes in split))


def _put(tree, shardings):
    """A global tree on all devices of its shardings (or of the one), of which each process fills its own; or has already."""
    if processes.number() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _, one=shardings: one, tree)

    def put(x, sharding):
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        return jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__)

    return jax.tree.map(put, tree, shardings)


def _held(sharding, num_rows) -> slice:
    """Which rows, of so many, the devices of this process hold."""
    held = [index[0].indices(num_rows) for index in sharding.addressable_devices_indices_map((num_rows,)).values()]
    return slice(min(start for start, _, _ in held), max(stop for _, stop, _ in held))


def _put_held(tree, sharding, num_parts):
    """As `_put`, of rows in `num_parts` parts, of which the tree has only those that this process holds."""
    if processes.number() == 1:
        return jax.device_put(tree, sharding)
    mine = _held(sharding, num_parts)

    def put(x):
        each = len(x) // (mine.stop - mine.start)
        num_rows = each * num_parts

        def part(index):
            start, stop, _ = index[0].indices(num_rows)
            return x[start - each * mine.start : stop - each * mine.start]

        return jax.make_array_from_callback((num_rows, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, tree)


def _whole(tree):
    """Placed arrays as NumPy arrays of their own, wherever their parts lie."""

    def get(x):
        return x if x.is_fully_addressable or x.is_fully_replicated else processes.all_rows(x)

    # On a CPU, device_get may hand out a view of a buffer that a later step donates, hence the copy.
    return jax.tree.map(np.array, jax.device_get(jax.tree.map(get, tree)))


def place(config: Config, or_fewer: bool = False) -> Placement:
    """The placement that `config.parallelism` names, over `config.num_devices` devices.

    Args:
      or_fewer: take all devices there are where the config asks for more.

    Raises:
      UserError: fewer devices than the config asks for.
    """
    present, wanted = len(jax.devices()), config.num_devices
    if or_fewer and wanted is not None:
        wanted = min(wanted, present)
    if config.parallelism == "pmap":
        return Placement(wanted)
    shape = config.mesh_shape
    if shape is None or (or_fewer and math.prod(shape) > present):
        return Sharded((1, wanted or present, 1), "num_devices")
    return Sharded(shape)


def device_summary(placement: Placement) -> dict[str, Any]:
    """What a person wants to know of the devices: platform, kind, number."""
    first = placement.devices[0]
    return {"platform": first.platform, "device": first.device_kind, "num_devices": placement.num_devices, "jax": jax.__version__}


def peak_bytes(placement: Placement) -> int | None:
    """Most memory in use so far on the first device, in bytes; None where the platform does not tell."""
    statistics = placement.devices[0].memory_stats()
    return statistics.get("peak_bytes_in_use") if statistics else None


def split_rows(tree, parts: int):
    """Rows [B, ...] as [parts, B / parts, ...], for a scan over micro-batches: of neighbours each goes into another part.

    So the rows of a part are spread over all devices that hold rows.
    """
    return jax.tree.map(lambda x: jnp.reshape(x, (x.shape[0] // parts, parts, *x.shape[1:])).swapaxes(0, 1), tree)


def join_rows(tree):
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: jnp.reshape(x.swapaxes(0, 1), (-1, *x.shape[2:])), tree)
