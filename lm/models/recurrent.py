"""RNN, GRU and LSTM: the cells, a layer that scans one over time, and the stack of layers."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.models.layers import Dropout, Initializer, WeightDrop, gatewise, segment_runs
from lm.partition import ALL_ROWS, constrain, locally

Array = jax.Array
State = tuple[Array, ...]  # float32 [B, H] each; the last one is the hidden state


class Cell(NamedTuple):
    """One step of a recurrence.

    Attributes:
      num_gates: blocks of width H in the fused matrices.
      num_states: arrays of the carry.
      step: (from_input [B, G*H], from_state [B, G*H], state) -> state, in float32.
      adds: whether `step` only uses the sum of its first two arguments.
    """

    num_gates: int
    num_states: int
    step: Callable[[Array, Array, State], State]
    adds: bool


def _rnn(activation):
    def step(from_input, from_state, state):
        del state
        return (activation(from_input + from_state),)

    return step


def _gru(from_input, from_state, state):
    (hidden,) = state
    reset_input, update_input, new_input = jnp.split(from_input, 3, axis=-1)
    reset_state, update_state, new_state = jnp.split(from_state, 3, axis=-1)
    reset = jax.nn.sigmoid(reset_input + reset_state)
    update = jax.nn.sigmoid(update_input + update_state)
    new = jnp.tanh(new_input + reset * new_state)
    return ((1 - update) * new + update * hidden,)


def _lstm(from_input, from_state, state):
    memory, _ = state
    i, f, g, o = jnp.split(from_input + from_state, 4, axis=-1)
    memory = jax.nn.sigmoid(f) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
    return memory, jax.nn.sigmoid(o) * jnp.tanh(memory)


def cell(name: str, activation: str | None = None) -> Cell:
    """A recurrence by name.

    rnn: h = act(x W + h U + b) (Elman 1990), act tanh or relu.
    lstm: gates i, f, g, o; c = f c + i g; h = o tanh(c) (Hochreiter & Schmidhuber 1997; Gers et al. 2000).
    gru: gates r, z, n; n = tanh(x W + b + r (h U + b')); h = (1 - z) n + z h: the reset acts after the matmul, as in torch
      and cuDNN (Cho et al. 2014, arXiv:1406.1078).
    """
    if name == "rnn":
        return Cell(1, 1, _rnn({"tanh": jnp.tanh, "relu": jax.nn.relu}[activation]), adds=True)
    return {"gru": Cell(3, 1, _gru, adds=False), "lstm": Cell(4, 2, _lstm, adds=True)}[name]


def _scan(cell, gates_TBG, shift_TBG, recurrent_kernel, state_bias, state, valid_TB, starts_TB):
    """The plain scan; `shift_TBG` (None: zero) is added to the state's part, so that its cotangent can be had."""

    def step(state, inputs):
        gates_BG, shift_BG, valid_B, starts_B = inputs
        if starts_B is not None:
            state = jax.tree.map(lambda s: jnp.where(starts_B[:, None], 0, s), state)
        from_state = (state[-1].astype(recurrent_kernel.dtype) @ recurrent_kernel).astype(jnp.float32) + state_bias
        if shift_BG is not None:
            from_state += shift_BG
        new = cell.step(gates_BG.astype(jnp.float32), from_state, state)
        if valid_B is not None:
            new = jax.tree.map(lambda n, s: jnp.where(valid_B[:, None], n, s), new, state)
        return new, new[-1].astype(recurrent_kernel.dtype)

    state, hidden_TBH = jax.lax.scan(step, state, (gates_TBG, shift_TBG, valid_TB, starts_TB))
    return hidden_TBH, state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recur(cell: Cell, gates_TBG: Array, recurrent_kernel: Array, state_bias: Array, state: State, valid_TB, starts_TB):
    """Scans a cell over time.

    The gradient of the recurrent matrix is one matmul over all time steps after the backward scan, where the scan's own
    derivative would add up a matrix of its size at every step.

    Args:
      cell: the recurrence.
      gates_TBG: the inputs' part of the gates.
      recurrent_kernel: [H, G*H].
      state_bias: [G*H], added to the state's part of the gates.
      state: before the first step.
      valid_TB, starts_TB: see `RecurrentLayer`; None: all valid.

    Returns:
      hidden_TBH in the kernel's dtype, and the state after the last step.
    """
    return _scan(cell, gates_TBG, None, recurrent_kernel, state_bias, state, valid_TB, starts_TB)


def _recur_forward(cell, gates_TBG, recurrent_kernel, state_bias, state, valid_TB, starts_TB):
    def run(gates_TBG, shift_TBG, state):
        return _scan(cell, gates_TBG, shift_TBG, recurrent_kernel, state_bias, state, valid_TB, starts_TB)

    shift_TBG = None if cell.adds else jnp.zeros(gates_TBG.shape, jnp.float32)
    (hidden_TBH, after), backward = jax.vjp(run, gates_TBG, shift_TBG, state)
    before_TBH = jnp.concatenate([state[-1].astype(hidden_TBH.dtype)[None], hidden_TBH[:-1]])
    if starts_TB is not None:
        before_TBH = jnp.where(starts_TB[:, :, None], 0, before_TBH)
    return (hidden_TBH, after), (backward, before_TBH, state_bias)


def _recur_backward(cell, saved, cotangents):
    backward, before_TBH, state_bias = saved
    d_gates_TBG, d_shift_TBG, d_state = backward(cotangents)
    d_from_state_TBG = d_gates_TBG if cell.adds else d_shift_TBG.astype(before_TBH.dtype)
    d_kernel = jnp.einsum("tbh,tbg->hg", before_TBH, d_from_state_TBG)
    d_bias = d_from_state_TBG.sum(axis=(0, 1), dtype=state_bias.dtype)
    return d_gates_TBG, d_kernel, d_bias, d_state, None, None


recur.defvjp(_recur_forward, _recur_backward)


class RecurrentLayer(nn.Module):
    """One recurrent layer over a whole segment: all input projections in one matmul, only the recurrence in the scan.

    Attributes:
      name_of_cell, activation: see `cell`.
      hidden_dim: H.
      weight_drop_rate: DropConnect on the recurrent matrix.
      forget_bias: initial bias of the LSTM's forget gate (Jozefowicz et al. 2015).
    """

    name_of_cell: str
    hidden_dim: int
    kernel_init: Initializer
    recurrent_init: Initializer
    activation: str | None = None
    weight_drop_rate: float = 0.0
    forget_bias: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        self.cell = cell(self.name_of_cell, self.activation)
        self.weight_drop = WeightDrop(self.weight_drop_rate)

    def _bias_init(self, key, shape, dtype=jnp.float32):
        del key
        bias = jnp.zeros(shape, dtype)
        return bias.at[self.hidden_dim : 2 * self.hidden_dim].set(self.forget_bias) if self.name_of_cell == "lstm" else bias

    @nn.compact
    def __call__(self, x_TBD: Array, state: State, valid_TB: Array | None, starts_TB: Array | None, train: bool):
        """Runs the recurrence.

        Args:
          x_TBD: inputs, time first.
          state: what the rows remember.
          valid_TB: where False the state stays as it is; None: all valid.
          starts_TB: where True the state is emptied before the step; given with valid_TB.

        Returns:
          hidden_TBH, and the state after the last step.
        """
        width = self.cell.num_gates * self.hidden_dim
        init, recurrent_init = (gatewise(i, self.cell.num_gates) for i in (self.kernel_init, self.recurrent_init))
        input_kernel = self.param("input_kernel", init, (x_TBD.shape[-1], width))
        recurrent_kernel = self.param("recurrent_kernel", recurrent_init, (self.hidden_dim, width))
        bias = self.param("bias", self._bias_init, (width,))
        gates_TBG = x_TBD @ input_kernel.astype(self.dtype) + bias.astype(self.dtype)
        state_bias = jnp.zeros((width,))
        if self.name_of_cell == "gru":  # the candidate's second bias stands inside the reset, so it cannot join the first
            recurrent_bias = self.param("recurrent_bias", nn.initializers.zeros, (self.hidden_dim,))
            state_bias = state_bias.at[2 * self.hidden_dim :].set(recurrent_bias)
        recurrent_kernel = self.weight_drop(recurrent_kernel, train).astype(self.dtype)
        time_rows, whole = (None, ALL_ROWS), ()
        recur_here = locally(
            lambda _, *arguments: recur(self.cell, *arguments),
            (time_rows, whole, whole, (ALL_ROWS,), time_rows, time_rows),
            (time_rows, tuple((ALL_ROWS,) for _ in state)),
        )
        return recur_here(gates_TBG, recurrent_kernel, state_bias, state, valid_TB, starts_TB)


class RecurrentStack(nn.Module):
    """Layers of one recurrence, with dropout on what enters the first, between them, and on what leaves the last.

    Attributes:
      name_of_cell, activation: see `cell`.
      layer_dims: width of each layer.
      embedding_dropout_rate, dropout_rate, output_dropout_rate: before, between and after the layers.
      variational: one mask for all steps of a segment.
    """

    name_of_cell: str
    layer_dims: tuple[int, ...]
    kernel_init: Initializer
    recurrent_init: Initializer
    activation: str | None = None
    embedding_dropout_rate: float = 0.0
    dropout_rate: float = 0.0
    output_dropout_rate: float = 0.0
    weight_drop_rate: float = 0.0
    variational: bool = False
    forget_bias: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        self.layers = [
            RecurrentLayer(
                name_of_cell=self.name_of_cell,
                hidden_dim=width,
                kernel_init=self.kernel_init,
                recurrent_init=self.recurrent_init,
                activation=self.activation,
                weight_drop_rate=self.weight_drop_rate,
                forget_bias=self.forget_bias,
                dtype=self.dtype,
                name=f"layer_{i}",
            )
            for i, width in enumerate(self.layer_dims)
        ]
        rates = [self.embedding_dropout_rate, *[self.dropout_rate] * (len(self.layer_dims) - 1), self.output_dropout_rate]
        self.dropouts = [Dropout(rate, constant_axis=0 if self.variational else None, row_axis=1) for rate in rates]

    def initial_carry(self, batch_size: int, length: int | None):
        """Zeros: for each layer a tuple of float32 [B, H], `(h,)` or `(c, h)`; the length does not matter."""
        del length
        num_states = cell(self.name_of_cell, self.activation).num_states
        return {
            f"layer_{i}": tuple(jnp.zeros((batch_size, width)) for _ in range(num_states))
            for i, width in enumerate(self.layer_dims)
        }

    def __call__(self, x_BTD, carry=None, *, segments_BT=None, rows_B=None, train=False):
        """Hidden states [B, T, H] of the last layer, and the carry after the last step (None if none was given)."""
        valid_TB = starts_TB = None
        if segments_BT is not None:
            valid_BT, runs_BT = segment_runs(segments_BT)
            valid_TB, starts_TB = valid_BT.T, jnp.diff(runs_BT, axis=1, prepend=0).T > 0
        states = self.initial_carry(x_BTD.shape[0], None) if carry is None else carry
        hidden = constrain(x_BTD.swapaxes(0, 1), None, ALL_ROWS)
        after = {}
        for layer, dropout in zip(self.layers, self.dropouts, strict=False):
            hidden, after[layer.name] = layer(dropout(hidden, rows_B, train), states[layer.name], valid_TB, starts_TB, train)
        hidden = self.dropouts[-1](hidden, rows_B, train)
        return hidden.swapaxes(0, 1), None if carry is None else after
