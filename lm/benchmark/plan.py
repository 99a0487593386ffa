"""A training step on a mesh, on paper: bytes that each device holds and sends, and what share of the step the sending takes.

What is sent is what XLA makes of the rules of lm.parallel, counted from the config; tests hold the counts against programs
compiled for small models. Split evenly, as models of size are: what an axis does not divide is not looked after.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from lm.benchmark.flops import TRAINING, forward_flops_per_token
from lm.config import Config, layer_dims
from lm.errors import UserError
from lm.models.build import build, initialise, parameter_role
from lm.models.output import logits_at_once
from lm.parallel import mesh_sizes, state_specs
from lm.training import optimizer as optimizers
from lm.training.step import initial_state

MeshShape = tuple[int, int, int]  # data, fsdp, tensor
_DATA, _FSDP, _TENSOR = mesh_sizes((1, 1, 1))
_FULL = 4  # bytes of a float32
_PLANNED = ("rnn", "gru", "lstm", "transformer")
_USABLE = 0.9  # of a device's memory


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices and what joins them, as their makers state it.

    Attributes:
      name: as people call it.
      flops: per second and device, of matmuls by the `compute_dtype` that JAX is given; float32 is rounded to TF32 or bfloat16.
      reached: share of them that a training step is taken to reach, an assumption.
      memory: bytes per device.
      link: bytes per second that a device sends to its neighbours: along one of the axes of a torus, or within a node.
      torus_axes: of a torus; 0: nodes.
      node: devices of a node.
      network: bytes per second that a device sends to other nodes.
      merges: whether the compiler adds before it sums over devices, and where a sum is split afterwards sends only the parts
        (XLA's AllReduceReassociate and ReduceScatterCreator, which its CPU compiler does not run).
      narrow: whether half precision is sent as such; the CPU compiler widens it.
    """

    name: str
    flops: Mapping[str, float]
    memory: float
    link: float
    torus_axes: int = 0
    node: int = 1
    network: float = math.inf
    reached: float = 0.5
    merges: bool = True
    narrow: bool = True

    def bandwidth(self, mesh_shape: MeshShape, axes: tuple[str, ...]) -> float:
        """Bytes per second that each device sends in a sum or gathering over some axes of a mesh."""
        sizes = mesh_sizes(mesh_shape)
        if self.torus_axes:
            return self.link * sum(self._torus_share(sizes)[axis] for axis in axes if sizes[axis] > 1)
        inner = tuple(reversed(sizes))  # neighbours differ in the last axis of a mesh
        stride, members, spans = 1, 1, False
        for axis in inner:
            for_this = sizes[axis] if axis in axes else 1
            inside = max(1, min(for_this, self.node // stride))
            members, spans = members * inside, spans or for_this > inside
            stride *= sizes[axis]
        return min(self.link, self.network * members) if spans else self.link

    def _torus_share(self, sizes):
        """How many axes of the torus each axis of the mesh lies along: one, and what is left goes to the largest."""
        used = [axis for axis, size in sizes.items() if size > 1]
        if not used:
            return dict.fromkeys(sizes, self.torus_axes)
        share = dict.fromkeys(used, 1)
        share[max(used, key=sizes.get)] += self.torus_axes - len(used)
        return share


# Google's page of v5p (a chip has six links, and 1,200 GB/s both ways in all); NVIDIA's data sheets (matmuls without sparsity,
# NVLink one way), and InfiniBand of 400 Gb/s for each GPU.
_HOPPER = {"bfloat16": 989e12, "float32": 495e12}
MACHINES = {
    "v5p": Machine("TPU v5p", {"bfloat16": 459e12, "float32": 459e12}, 95 * 2**30, 200e9, torus_axes=3),
    "h100": Machine("H100 SXM", _HOPPER, 80e9, 450e9, node=8, network=50e9),
    "h200": Machine("H200 SXM", _HOPPER, 141e9, 450e9, node=8, network=50e9),
}


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that each device sends in a step, in rings: (n - 1) / n of what is gathered or split, twice that of a sum.

    Attributes:
      what: that is sent.
      axes: of the mesh, that it is sent along.
    """

    what: str
    axes: tuple[str, ...]
    num_bytes: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step of a config on a mesh of a machine.

    Attributes:
      state_bytes: parameters and what the optimiser keeps, on each device.
      memory: bytes of each device at the step's fullest, by what they hold.
      sent: all that each device sends.
      compute_seconds: arithmetic of a step at `Machine.reached`, what is made again included.
      sending_seconds: of all that is sent, one after the other.
    """

    mesh_shape: MeshShape
    state_bytes: int
    memory: dict[str, float]
    sent: tuple[Sent, ...]
    compute_seconds: float
    sending_seconds: float

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def sent_bytes(self) -> float:
        return sum(sent.num_bytes for sent in self.sent)

    @property
    def share(self) -> float:
        """Of the step's time, that goes into sending if nothing is sent while something is computed."""
        return self.sending_seconds / (self.sending_seconds + self.compute_seconds)


def plan(config: Config, vocab_size: int, mesh_shape: MeshShape, machine: Machine) -> Plan:
    """The step of a config on a mesh.

    Args:
      config: resolved, its widths solved; placement and number of devices in it are left aside.

    Raises:
      UserError: `config.model.remat` is "matmuls", or there are micro-batches: neither has been counted.
    """
    return _plan(_Sizes.of(config, vocab_size), mesh_shape, machine)


def plans(config: Config, vocab_size: int, num_devices: int, machine: Machine) -> list[Plan]:
    """Of all meshes (of the one that the config names, if it does) which split the model evenly and fit into memory, the fastest
    first.

    Raises:
      UserError: there is none; and as `plan`.
    """
    sizes, shapes = _Sizes.of(config, vocab_size), [config.mesh_shape] if config.mesh_shape else _meshes(num_devices)
    found = [_plan(sizes, shape, machine) for shape in shapes if _divides(config, vocab_size, shape)]
    if not found:
        which, instead = f"no mesh of {num_devices} devices divides", "number of devices"
        if config.mesh_shape:
            which, instead = f"config.mesh_shape {config.mesh_shape} does not divide", "mesh"
        raise UserError(f"{which} heads, widths, vocabulary and config.data.batch_size; take another {instead}")
    fitting = [one for one in found if one.memory_bytes < _USABLE * machine.memory]
    if not fitting:
        least = min(one.memory_bytes for one in found)
        raise UserError(
            f"on {num_devices} devices a step takes {least / 2**30:,.0f} GiB of each, more than nine tenths of the "
            f"{machine.memory / 2**30:,.0f} GiB of {machine.name}; take more devices, a smaller config.data.batch_size or "
            "config.model.remat=full"
        )
    return sorted(fitting, key=lambda one: one.compute_seconds + one.sending_seconds)


def _plan(sizes, mesh_shape, machine):
    step = _Step(sizes, mesh_shape, machine)
    sent = tuple(part for part in step.sent() if part.num_bytes)
    return Plan(
        mesh_shape,
        step.state_bytes(),
        step.memory(),
        sent,
        sizes.flops / (math.prod(mesh_shape) * machine.flops[sizes.config.compute_dtype] * machine.reached),
        sum(part.num_bytes / machine.bandwidth(mesh_shape, part.axes) for part in sent),
    )


def _meshes(num_devices):
    for tensor in _divisors(num_devices):
        for fsdp in _divisors(num_devices // tensor):
            yield num_devices // (fsdp * tensor), fsdp, tensor


def _divisors(number):
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _divides(config, vocab_size, mesh_shape):
    data, fsdp, tensor = mesh_shape
    model = config.model
    heads = model.num_heads if model.architecture == "transformer" else tensor
    rows = data * fsdp if model.architecture == "transformer" else data * fsdp * tensor
    widths = layer_dims(model)
    if model.architecture == "transformer":
        widths = (*widths, model.mlp_dim)
    return (
        config.data.batch_size % rows == 0
        and heads % tensor == 0
        and vocab_size % tensor == 0
        and all(width % (fsdp * tensor) == 0 for width in widths)
    )


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What a config comes to on any mesh: numbers of entries, and the operations of a step.

    Attributes:
      layers: of each layer, the entries of its matrices.
      vectors: learned positions with them.
      output: 0 where it is tied to the table.
      state: shapes of all that training keeps.
    """

    config: Config
    layers: tuple[dict[str, int], ...]
    vectors: int
    table: int
    output: int
    state: Any
    flops: float

    @classmethod
    def of(cls, config, vocab_size):
        if config.model.remat == "matmuls" or config.training.num_micro_batches > 1:
            raise UserError("a plan takes neither config.model.remat=matmuls nor micro-batches; it takes none and full")
        if config.model.architecture not in _PLANNED:
            raise UserError(
                f"a plan takes no config.model.architecture={config.model.architecture}; it takes {', '.join(_PLANNED)}"
            )
        for name, is_set in (
            ("model.project_output", config.model.project_output),
            ("model.positions=relative", config.model.positions == "relative"),
            ("model.qk_norm", config.model.qk_norm),
            ("model.cutoffs", config.model.cutoffs),
            ("model.num_softmaxes", (config.model.num_softmaxes or 1) > 1),
            ("model.mogrifier_rounds", config.model.mogrifier_rounds),
            ("data.seq_len_std", config.data.seq_len_std is not None),
        ):
            if is_set:
                raise UserError(f"a plan takes no config.{name}; leave it open")
        params = jax.eval_shape(functools.partial(initialise, build(config, vocab_size), 0))
        layers: dict[str, dict[str, int]] = {}
        sizes = dict.fromkeys(("vectors", "table", "output"), 0)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            names = tuple(part.key for part in path)
            size, role = math.prod(leaf.shape), parameter_role(names)
            if leaf.ndim == 1 or names[-1] == "position_table":
                sizes["vectors"] += size
            elif role == "matrix":
                layers.setdefault(names[1], {})["/".join(names[2:])] = size
            else:
                sizes["output" if role == "output" else "table"] += size
        optimizer, _ = optimizers.build(config, 1)
        state = jax.eval_shape(lambda params: initial_state(params, optimizer, config.training), params)
        passes = TRAINING + (config.model.remat == "full")
        flops = forward_flops_per_token(config, vocab_size) * passes * config.data.batch_size * config.data.seq_len
        return cls(config, tuple(layers.values()), state=state, flops=flops, **sizes)


class _Step:
    """A step on a mesh. `tokens` are those of a device's rows."""

    def __init__(self, sizes, mesh_shape, machine):
        self.config, self.mesh_shape, self.machine = sizes.config, mesh_shape, machine
        self.layers, self.vectors, self.table, self.output = sizes.layers, sizes.vectors, sizes.table, sizes.output
        self._state = sizes.state
        data, fsdp, _ = mesh_shape
        self.tokens = self.config.data.batch_size * self.config.data.seq_len / (data * fsdp)

    def state_bytes(self) -> int:
        sizes = mesh_sizes(self.mesh_shape)

        def held(leaf, spec):
            axes = [axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)]
            return math.prod(leaf.shape) * leaf.dtype.itemsize // math.prod(sizes[axis] for axis in axes)

        specs = jax.tree.leaves(state_specs(self._state, sizes), is_leaf=lambda x: isinstance(x, PartitionSpec))
        return sum(held(leaf, spec) for leaf, spec in zip(jax.tree.leaves(self._state), specs, strict=True))

    def sent(self) -> Iterator[Sent]:
        yield from self._sent_by_ends()
        if self.config.model.architecture == "transformer":
            yield from self._sent_by_blocks()
        else:
            yield from self._sent_by_recurrences()

    def _sent_by_ends(self):
        """Embedding, output and all vectors."""
        tensor = self.mesh_shape[2]
        yield self._gathered("table", self.table / tensor * _FULL, _FSDP)
        yield self._summed("embeddings", self.tokens * self._embedded * _FULL, _TENSOR)
        yield self._summed("gradient of the table", self.table / tensor * _FULL, _DATA, _FSDP)
        yield self._gathered("output", self.output / tensor * self._narrow, _FSDP)
        yield self._summed("gradient of the output", (self.output or self.table) / tensor * _FULL, _DATA, _FSDP)
        yield self._summed("gradient of the last hidden states", self.tokens * self._width * self._narrow, _TENSOR)
        yield self._summed("losses", 3 * self.tokens * _FULL, _TENSOR)
        yield self._gathered("vectors", self.vectors * _FULL, _FSDP, _TENSOR)
        yield self._summed("gradients of the vectors", self.vectors * _FULL, _DATA, _FSDP)

    def _sent_by_blocks(self):
        """Of a Transformer: matrices gathered over fsdp in each pass, sums over tensor at the ends of both branches."""
        _, fsdp, tensor = self.mesh_shape
        model = self.config.model
        made_again = model.remat == "full"
        size = sum(sum(layer.values()) for layer in self.layers) * self._narrow / tensor
        passes = 2 if made_again or tensor > 1 else 1  # split both ways, a matrix is not kept for the backward pass
        yield self._gathered("matrices", passes * size, _FSDP)
        yield self._split_sum("gradients of the matrices", size, _FSDP)
        yield self._summed("gradients of the matrices", size / fsdp, _DATA)
        into_branches = 2 if self.machine.merges else 3 + (2 if model.activation == "swiglu" else 1)
        hidden = self.tokens * self._width * self._narrow
        yield self._gathered("hidden states and their gradients", (model.num_layers * (4 + 3 * made_again) + 2) * hidden, _TENSOR)
        yield self._split_sum(
            "hidden states and their gradients", model.num_layers * (2 + made_again + into_branches) * hidden, _TENSOR
        )
        yield self._summed("norms", model.num_layers * (8 + 4 * made_again) * self.tokens * _FULL, _TENSOR)

    def _sent_by_recurrences(self):
        """Of recurrent layers: whole matrices on every device, rows split over all; hidden states gathered at the end."""
        _, fsdp, tensor = self.mesh_shape
        for layer in self.layers:
            size = {name: entries * self._narrow for name, entries in layer.items()}
            whole = sum(size.values())
            yield self._gathered("matrices", whole / fsdp, _TENSOR)
            yield self._gathered("matrices", whole, _FSDP)
            recurrent = sum(value for name, value in size.items() if name == "recurrent_kernel")
            yield self._split_sum("gradients of the recurrent matrices", recurrent, _DATA, _FSDP, _TENSOR)
            yield self._split_sum("gradients of the input matrices", whole - recurrent, _TENSOR)
            yield self._split_sum("gradients of the input matrices", whole - recurrent, _FSDP)
            yield self._summed("gradients of the input matrices", (whole - recurrent) / (fsdp * tensor), _DATA)
        ends = self.tokens * (self._embedded + self._width) * self._narrow
        yield self._gathered("hidden states and their gradients", ends, _TENSOR)

    def memory(self) -> dict[str, float]:
        """Bytes on a device, by what they hold, when most is held: at the end of the forward pass."""
        _, fsdp, tensor = self.mesh_shape
        params = sum(sum(layer.values()) for layer in self.layers) + self.table + self.output
        return {
            "state": self.state_bytes(),
            "gradients": params / (fsdp * tensor) * _FULL,
            "gathered matrices": self._gathered_bytes(),
            "table and output, gathered, and their gradients": (self.table + max(self.output, self.table)) / tensor * _FULL,
            "kept for the backward pass": self._kept_bytes(),
            "logits": 3 * _FULL * min(self.tokens * self.table / self._embedded / tensor, logits_at_once("tpu")),
        }

    def _gathered_bytes(self):
        _, fsdp, tensor = self.mesh_shape
        sizes = [sum(layer.values()) * self._narrow for layer in self.layers]
        if self.config.model.architecture != "transformer":
            return sum(sizes) if fsdp * tensor > 1 else 0
        if fsdp == 1:
            return 0
        return (2 * max(sizes) if self.config.model.remat == "full" else sum(sizes)) / tensor

    def _kept_bytes(self):
        """Of every layer its input and, where that is not made again, what is in it."""
        tensor = self.mesh_shape[2]
        model = self.config.model
        if model.architecture != "transformer":
            gates = {"rnn": 1, "gru": 3, "lstm": 4}[model.architecture]
            return sum(self.tokens / tensor * width * (2 * gates + 2) * self._narrow for width in self._widths)
        inside = self.tokens * (4 * model.hidden_dim + (4 * model.hidden_dim + 3 * model.mlp_dim) / tensor) * self._narrow
        inputs = self.tokens * model.hidden_dim / tensor * self._narrow * model.num_layers
        return inputs + inside * (1 if model.remat == "full" else model.num_layers)

    @property
    def _widths(self):
        return layer_dims(self.config.model)

    @property
    def _width(self):
        return self._widths[-1]

    @property
    def _embedded(self):
        return self.config.model.embed_dim or self._width

    @property
    def _narrow(self):
        """Bytes of a number in compute_dtype, as it is sent."""
        return np.dtype(jax.numpy.dtype(self.config.compute_dtype)).itemsize if self.machine.narrow else _FULL

    def _size(self, axes):
        sizes = mesh_sizes(self.mesh_shape)
        return math.prod(sizes[axis] for axis in axes)

    def _gathered(self, what, num_bytes, *axes):
        count = self._size(axes)
        return Sent(what, axes, num_bytes * (count - 1) / count)

    def _summed(self, what, num_bytes, *axes):
        """Of the same size on every device afterwards."""
        count = self._size(axes)
        return Sent(what, axes, 2 * num_bytes * (count - 1) / count)

    def _split_sum(self, what, num_bytes, *axes):
        """Of which each device keeps its part."""
        count = self._size(axes)
        return Sent(what, axes, (1 if self.machine.merges else 2) * num_bytes * (count - 1) / count)
