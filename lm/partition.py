"""How arrays may be split over devices, said in names that models know; lm.parallel gives the names device axes.

Outside a function that lm.parallel compiles for a mesh, nothing is split and everything here does nothing.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array
Names = tuple[str | None, ...]  # of an array's axes, from the first; None: not split

ROWS = "rows"  # of a batch
ALL_ROWS = "all_rows"  # the same, also over those devices that share a row's vocabulary or heads
VOCABULARY = "vocabulary"
HEADS = "heads"
WIDTH = "width"  # of hidden states, between the layers that mix them


@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh of devices, and which of its axes each name stands for."""

    mesh: Mesh
    axes: Mapping[str, tuple[str, ...]]

    def size(self, axes: tuple[str, ...]) -> int:
        """Into how many parts these axes split."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def dividing(self, name: str, size: int) -> tuple[str, ...]:
        """The axes that a name stands for, without the last ones where their parts of `size` would be unequal."""
        axes = self.axes[name]
        while size % self.size(axes):
            axes = axes[:-1]
        return axes

    def axes_for(self, arrays: Iterable[tuple[Names, tuple[int, ...]]]) -> dict[str | None, tuple[str, ...]]:
        """The axes of each name, of which the parts of all arrays, told by names and shape, are equal."""
        found: dict[str | None, tuple[str, ...]] = {}
        for names, shape in arrays:
            for name, size in zip(names, shape, strict=False):
                if name:
                    found[name] = min(found.get(name, self.axes[name]), self.dividing(name, size), key=len)
        return found


def _spec(axes, names):
    return PartitionSpec(*(axes.get(name) or None for name in names))


def _is_names(value):
    return isinstance(value, tuple) and all(name is None or isinstance(name, str) for name in value)


_current: contextvars.ContextVar[Partition | None] = contextvars.ContextVar("partition", default=None)


@contextlib.contextmanager
def use(partition: Partition) -> Iterator[None]:
    """What is traced in here is for devices that split arrays like this."""
    token = _current.set(partition)
    try:
        yield
    finally:
        _current.reset(token)


def constrain(x: Array, *names: str | None) -> Array:
    """The same array, split by the names of its first axes; the others are whole on every device."""
    partition = _current.get()
    if partition is None:
        return x
    axes = partition.axes_for([(names, x.shape)])
    return jax.lax.with_sharding_constraint(x, NamedSharding(partition.mesh, _spec(axes, names)))


def count(name: str) -> int:
    """Into how many parts a name splits."""
    partition = _current.get()
    return 1 if partition is None else partition.size(partition.axes[name])


@dataclasses.dataclass(frozen=True)
class Part:
    """What a function that runs on a part of its arguments knows of the other parts.

    Attributes:
      axes: of the mesh, by name; without entries where nothing is split.
    """

    axes: Mapping[str | None, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def sum(self, tree: Any, name: str) -> Any:
        """Sum over the parts that a name splits into, on all of them; also the largest and the smallest below."""
        return self._over(jax.lax.psum, tree, name)

    def max(self, tree: Any, name: str) -> Any:
        """As `sum`."""
        return self._over(jax.lax.pmax, tree, name)

    def min(self, tree: Any, name: str) -> Any:
        """As `sum`."""
        return self._over(jax.lax.pmin, tree, name)

    def _over(self, reduce, tree, name):
        return reduce(tree, self.axes[name]) if self.axes.get(name) else tree


def locally(function: Callable, inputs: tuple[Any, ...], outputs: Any) -> Callable:
    """A function that each device runs on its part of the arguments.

    Args:
      function: (part, *arguments) -> results.
      inputs: for each argument, the names of its axes, or of those of all arrays in it.
      outputs: the same for the results; a result that lacks a name is the same on all parts that the name splits into.

    Returns:
      A function of whole arrays.
    """

    def whole(*arguments):
        partition = _current.get()
        if partition is None:
            return function(Part(), *arguments)
        named = zip(inputs, arguments, strict=True)
        axes = partition.axes_for((names, leaf.shape) for names, argument in named for leaf in jax.tree.leaves(argument))
        split = jax.shard_map(
            lambda *parts: function(Part(axes), *parts),
            mesh=partition.mesh,
            in_specs=tuple(_spec(axes, names) for names in inputs),
            out_specs=jax.tree.map(lambda names: _spec(axes, names), outputs, is_leaf=_is_names),
            check_vma=False,
        )
        return split(*arguments)

    return whole
