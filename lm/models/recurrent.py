"""RNN, GRU, LSTM and sLSTM: the cells, a layer that scans one over time; and the stack of layers, of these or linear ones."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.models.layers import Dropout, Initializer, WeightDrop, apart, gatewise, in_two_axes, segment_runs
from lm.models.linear_recurrences import MatrixLayer, MinimalLayer
from lm.models.products import Dense, times
from lm.models.scan import scan_products
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
      forget_gate: which of the blocks is the LSTM's forget gate; None: there is none.
    """

    num_gates: int
    num_states: int
    step: Callable[[Array, Array, State], State]
    adds: bool
    forget_gate: int | None = None


def _rnn(activation):
    def step(from_input, from_state, state):
        del state
        return (activation(from_input + from_state),)

    return step


@jax.custom_jvp
def _sigmoid(x):
    """The sigmoid; where no gradient of it is needed, apart. With a gradient each is kept, so that none shares a loop."""
    return apart(jax.nn.sigmoid, x)


@_sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    return jax.jvp(jax.nn.sigmoid, primals, tangents)


def _gru(from_input, from_state, state):
    (hidden,) = state
    reset_input, update_input, new_input = jnp.split(from_input, 3, axis=-1)
    reset_state, update_state, new_state = jnp.split(from_state, 3, axis=-1)
    reset, update = _sigmoid(reset_input + reset_state), _sigmoid(update_input + update_state)
    new = jnp.tanh(new_input + reset * new_state)
    return ((1 - update) * new + update * hidden,)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _open(gates_BG, num_gates):
    """The sigmoid of each of some blocks that stand side by side.

    As `_sigmoid`, for an LSTM. Its memory and its hidden state both need what is taken of all blocks at once, which is therefore
    in a loop of its own; to take them one by one, as the GRU's, is up to a fifth slower.
    """
    return jnp.split(jax.nn.sigmoid(gates_BG), num_gates, axis=-1)


@_open.defjvp
def _open_jvp(num_gates, primals, tangents):
    return jax.jvp(lambda gates_BG: [jax.nn.sigmoid(x) for x in jnp.split(gates_BG, num_gates, axis=-1)], primals, tangents)


def _lstm(input_gate):
    def step(from_input, from_state, state):
        memory, _ = state
        gates = from_input + from_state
        if input_gate == "coupled":
            forget, _, out = _open(gates, 3)
            write = 1 - forget
        else:
            write, forget, _, out = _open(gates, 4)
            if input_gate == "capped":
                write = jnp.minimum(write, 1 - forget)
        width = memory.shape[-1]
        memory = forget * memory + write * jnp.tanh(gates[:, -2 * width : -width])
        return memory, out * jnp.tanh(memory)

    return step


def _slstm(from_input, from_state, state):
    memory, total, largest, _ = state
    write, forget, new, out = jnp.split(from_input + from_state, 4, axis=-1)
    # A state that holds nothing has no largest factor yet.
    kept = jnp.where(total > 0, jax.nn.log_sigmoid(forget) + largest, -jnp.inf)
    largest = jnp.maximum(kept, write)
    keep, add = jnp.exp(kept - largest), jnp.exp(write - largest)
    memory, total = keep * memory + add * jnp.tanh(new), keep * total + add
    return memory, total, largest, jax.nn.sigmoid(out) * memory / total


def cell(name: str, activation: str | None = None, input_gate: str | None = None) -> Cell:
    """A recurrence by name.

    rnn: h = act(x W + h U + b) (Elman 1990), act tanh or relu.
    lstm: gates i, f, g, o; c = f c + i g; h = o tanh(c) (Hochreiter & Schmidhuber 1997; Gers et al. 2000). The input gate is
      "free" (or None); "coupled", i = 1 - f, which leaves f, g, o (Greff et al. 2017, arXiv:1503.04069); or "capped",
      i = min(sigmoid, 1 - f), which keeps |c| below 1 (Melis et al. 2018, arXiv:1707.05589).
    gru: gates r, z, n; n = tanh(x W + b + r (h U + b')); h = (1 - z) n + z h: the reset acts after the matmul, as in torch
      and cuDNN (Cho et al. 2014, arXiv:1406.1078).
    slstm: gates i, f, z, o; c = f c + i tanh(z); n = f n + i; h = o c / n, with i = exp, f and o sigmoids (Beck et al. 2024,
      arXiv:2405.04517, equations 8 to 18, one head); c and n are kept divided by exp(m), the largest factor so far.
    """
    if name == "rnn":
        return Cell(1, 1, _rnn({"tanh": jnp.tanh, "relu": jax.nn.relu}[activation]), adds=True)
    if name == "gru":
        return Cell(3, 1, _gru, adds=False)
    if name == "slstm":
        return Cell(4, 4, _slstm, adds=True, forget_gate=1)
    coupled = input_gate == "coupled"
    return Cell(3 if coupled else 4, 2, _lstm(input_gate), adds=True, forget_gate=0 if coupled else 1)


def recur(cell: Cell, gates_TBG: Array, recurrent_kernel: Array, state_bias, state: State, scale_BH, valid_TB, starts_TB):
    """Scans a cell over time.

    Args:
      cell: the recurrence.
      gates_TBG: the inputs' part of the gates.
      recurrent_kernel: [H, G*H].
      state_bias: [G*H], added to the state's part of the gates; None where that is the same as a bias in `gates_TBG`.
      state: before the first step.
      scale_BH: factors on the hidden state where it meets the matrix, the same at all steps (a dropout mask, which has no
        gradient); None: ones.
      valid_TB, starts_TB: see `RecurrentLayer`; None: all valid.

    Returns:
      hidden_TBH in the kernel's dtype, and the state after the last step.
    """
    if cell.adds:
        gates_TBG = gates_TBG if state_bias is None else gates_TBG + state_bias.astype(gates_TBG.dtype)
        shifts_T, inputs_T = {"state": gates_TBG}, None
    else:
        shifts_T, inputs_T = {"state": jnp.broadcast_to(state_bias, gates_TBG.shape)}, gates_TBG

    def step(product, state, gates_BG, hidden_BH):
        return cell.step(0.0 if gates_BG is None else gates_BG.astype(jnp.float32), product("state", hidden_BH), state)

    def hidden_before(hidden_TBH, state, masks, scale_BH):
        before_TBH = jnp.concatenate([state[-1].astype(hidden_TBH.dtype)[None], hidden_TBH[:-1]])
        if masks[1] is not None:
            before_TBH = jnp.where(masks[1][:, :, None], 0, before_TBH)
        return {"state": before_TBH if scale_BH is None else (before_TBH * scale_BH).astype(before_TBH.dtype)}

    return _recur(step, hidden_before, {"state": recurrent_kernel}, shifts_T, inputs_T, state, scale_BH, valid_TB, starts_TB)


def recur_mogrified(
    cell: Cell, x_TBD: Array, kernels: Mapping[str, Array], bias: Array, state: State, scale_BH, valid_TB, starts_TB
):
    """Scans a cell whose input and hidden state gate each other in turns before they meet it (Melis et al. 2020,
    arXiv:1909.01792, equations 2 and 3): x <- 2 σ(Q h) x, then h <- 2 σ(R x) h, and so on.

    Args:
      cell: an LSTM, which only uses the sum of both parts of its gates.
      x_TBD: inputs.
      kernels: `gates` [D + H, G*H], of input and state; and for each round "1", "2" … a matrix [H, D] if it is odd, else
        [D, H], or the factors "1_left" and "1_right" of one of low rank.
      bias: [G*H].
      state, scale_BH, valid_TB, starts_TB: as in `recur`, with the same results.
    """
    num_rounds = len({name.split("_")[0] for name in kernels} - {"gates"})
    shifts_T = {name: jnp.zeros((*x_TBD.shape[:2], kernel.shape[1])) for name, kernel in kernels.items()}
    shifts_T["gates"] += bias

    def step(product, state, x_BD, hidden_BH):
        def gate(number, value):
            if f"{number}_left" in kernels:
                return 2 * jax.nn.sigmoid(product(f"{number}_right", product(f"{number}_left", value)))
            return 2 * jax.nn.sigmoid(product(str(number), value))

        x_BD = x_BD.astype(jnp.float32)
        for number in range(1, num_rounds + 1):
            if number % 2:
                x_BD *= gate(number, hidden_BH)
            else:
                hidden_BH *= gate(number, x_BD)
        return cell.step(0.0, product("gates", jnp.concatenate([x_BD, hidden_BH], axis=-1)), state)

    return _recur(step, None, kernels, shifts_T, x_TBD, state, scale_BH, valid_TB, starts_TB)


def _recur(step, recover, kernels, shifts_T, inputs_T, state, scale_BH, valid_TB, starts_TB):
    """Scans `step(product, state, input, hidden state) -> state` over valid tokens, emptying the state where texts start."""
    dtype = next(iter(kernels.values())).dtype

    def masked(product, state, inputs, masks, scale_BH):
        valid_B, starts_B = masks
        if starts_B is not None:
            state = jax.tree.map(lambda s: jnp.where(starts_B[:, None], 0, s), state)
        new = step(product, state, inputs, state[-1] if scale_BH is None else state[-1] * scale_BH)
        if valid_B is not None:
            new = jax.tree.map(lambda n, s: jnp.where(valid_B[:, None], n, s), new, state)
        return new, new[-1].astype(dtype)

    return scan_products(masked, recover, kernels, shifts_T, inputs_T, state, (valid_TB, starts_TB), scale_BH)


class RecurrentLayer(nn.Module):
    """One recurrent layer over a whole segment: all input projections in one matmul, only the recurrence in the scan.

    Attributes:
      name_of_cell, activation, input_gate: see `cell`.
      hidden_dim: H.
      weight_drop_rate: DropConnect on the recurrent matrix.
      state_dropout_rate: dropout on the hidden state where it meets that matrix, one mask a row for all steps of a segment
        (Gal & Ghahramani 2016, arXiv:1512.05287).
      mogrifier_rounds, mogrifier_rank: how often input and state gate each other, see `recur_mogrified`; None: full matrices.
      forget_bias: initial bias of the LSTM's forget gate (Jozefowicz et al. 2015).
    """

    name_of_cell: str
    hidden_dim: int
    kernel_init: Initializer
    recurrent_init: Initializer
    activation: str | None = None
    input_gate: str | None = None
    weight_drop_rate: float = 0.0
    state_dropout_rate: float = 0.0
    mogrifier_rounds: int = 0
    mogrifier_rank: int | None = None
    forget_bias: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        self.cell = cell(self.name_of_cell, self.activation, self.input_gate)
        self.weight_drop = WeightDrop(self.weight_drop_rate)
        self.state_dropout = Dropout(self.state_dropout_rate)

    def state_shapes(self, batch_size: int) -> list[tuple[int, ...]]:
        """Of what a row remembers: (h,) of an RNN and a GRU, (c, h) of an LSTM, (c, n, m, h) of an sLSTM, [B, H] each."""
        return [(batch_size, self.hidden_dim)] * cell(self.name_of_cell, self.activation, self.input_gate).num_states

    def _bias_init(self, key, shape, dtype=jnp.float32):
        del key
        bias, gate = jnp.zeros(shape, dtype), self.cell.forget_gate
        return bias if gate is None else bias.at[gate * self.hidden_dim : (gate + 1) * self.hidden_dim].set(self.forget_bias)

    @nn.compact
    def __call__(
        self,
        x_TBD: Array,
        state: State,
        valid_TB: Array | None,
        starts_TB: Array | None,
        train: bool,
        rows_B: Array | None = None,
    ):
        """Runs the recurrence.

        Args:
          x_TBD: inputs, time first.
          state: what the rows remember.
          valid_TB: where False the state stays as it is; None: all valid.
          starts_TB: where True the state is emptied before the step; given with valid_TB.
          rows_B: global row numbers, which key dropout.

        Returns:
          hidden_TBH, and the state after the last step.
        """
        width = self.cell.num_gates * self.hidden_dim
        init, recurrent_init = (gatewise(i, self.cell.num_gates) for i in (self.kernel_init, self.recurrent_init))
        input_kernel = self.param("input_kernel", init, (x_TBD.shape[-1], width))
        recurrent_kernel = self.param("recurrent_kernel", recurrent_init, (self.hidden_dim, width))
        bias = self.param("bias", self._bias_init, (width,))
        state_bias = None
        if self.name_of_cell == "gru":  # the candidate's second bias stands inside the reset, so it cannot join the first
            recurrent_bias = self.param("recurrent_bias", nn.initializers.zeros, (self.hidden_dim,))
            state_bias = jnp.zeros((width,)).at[2 * self.hidden_dim :].set(recurrent_bias)
        recurrent_kernel = self.weight_drop(recurrent_kernel, train).astype(self.dtype)
        scale_BH = None
        if train and self.state_dropout_rate:
            scale_BH = self.state_dropout(jnp.ones_like(state[-1]), rows_B, train)
        time_rows, whole, rows = (None, ALL_ROWS), (), (ALL_ROWS,)

        def run(recurrence, *arguments):
            here = locally(
                lambda _, *arguments: recurrence(self.cell, *arguments),
                (time_rows, whole, whole, rows, rows, time_rows, time_rows),
                (time_rows, tuple(rows for _ in state)),
            )
            return here(*arguments, state, scale_BH, valid_TB, starts_TB)

        if self.mogrifier_rounds:
            gates = jnp.concatenate([input_kernel.astype(self.dtype), recurrent_kernel])
            return run(recur_mogrified, x_TBD, {"gates": gates, **self._mogrifier_kernels(x_TBD.shape[-1])}, bias)
        kernel = input_kernel.astype(self.dtype)
        gates_TBG = in_two_axes(lambda x: times(x, kernel), x_TBD, ALL_ROWS) + bias.astype(self.dtype)
        return run(recur, gates_TBG, recurrent_kernel, state_bias)

    def _mogrifier_kernels(self, input_dim):
        shapes = {}
        for number in range(1, self.mogrifier_rounds + 1):
            shape = (self.hidden_dim, input_dim) if number % 2 else (input_dim, self.hidden_dim)
            if self.mogrifier_rank is None:
                shapes[str(number)] = shape
            else:
                shapes[f"{number}_left"] = shape[0], self.mogrifier_rank
                shapes[f"{number}_right"] = self.mogrifier_rank, shape[1]
        return {
            name: self.param(f"mogrifier_{name}_kernel", self.kernel_init, shape).astype(self.dtype)
            for name, shape in shapes.items()
        }


class RecurrentStack(nn.Module):
    """Layers of one recurrence, with dropout on what enters the first, between them, and on what leaves the last.

    Attributes:
      name_of_cell: a recurrence of `cell`, or one of lm.models.linear_recurrences.
      activation, input_gate: see `cell`.
      layer_dims: width of each layer.
      skip_connections: the output is the sum of the layers' hidden states, not those of the last alone (Melis et al. 2018,
        arXiv:1707.05589); the layers are then of one width.
      embedding_dropout_rate, dropout_rate, output_dropout_rate: before, between and after the layers.
      weight_drop_rate, state_dropout_rate, mogrifier_rounds, mogrifier_rank: see `RecurrentLayer`.
      variational: one mask for all steps of a segment.
      projected_dim: width of a product that follows the last dropout (Melis et al. 2018), so that a tied output can be
        narrower than the last layer; None: there is none.
      num_heads: of an mLSTM.

    The layers' output is sown to `intermediates` for objectives that look at it: `last_hidden_BTH` as it is,
    `dropped_hidden_BTH` after dropout.
    """

    name_of_cell: str
    layer_dims: tuple[int, ...]
    kernel_init: Initializer
    recurrent_init: Initializer
    activation: str | None = None
    input_gate: str | None = None
    embedding_dropout_rate: float = 0.0
    dropout_rate: float = 0.0
    output_dropout_rate: float = 0.0
    weight_drop_rate: float = 0.0
    state_dropout_rate: float = 0.0
    mogrifier_rounds: int = 0
    mogrifier_rank: int | None = None
    variational: bool = False
    projected_dim: int | None = None
    skip_connections: bool = False
    num_heads: int = 1
    forget_bias: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        self.layers = [self._layer(width, name=f"layer_{i}") for i, width in enumerate(self.layer_dims)]
        rates = [self.embedding_dropout_rate, *[self.dropout_rate] * (len(self.layer_dims) - 1), self.output_dropout_rate]
        self.dropouts = [Dropout(rate, constant_axis=0 if self.variational else None, row_axis=1) for rate in rates]
        if self.projected_dim is not None:
            self.projection = Dense(self.projected_dim, use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype)

    def _layer(self, width, **options):
        linear = dict(kernel_init=self.kernel_init, forget_bias=self.forget_bias, dtype=self.dtype, **options)
        if self.name_of_cell in ("mingru", "minlstm"):
            return MinimalLayer(self.name_of_cell, width, **linear)
        if self.name_of_cell == "mlstm":
            return MatrixLayer(width, self.num_heads, **linear)
        return RecurrentLayer(
            name_of_cell=self.name_of_cell,
            hidden_dim=width,
            kernel_init=self.kernel_init,
            recurrent_init=self.recurrent_init,
            activation=self.activation,
            input_gate=self.input_gate,
            weight_drop_rate=self.weight_drop_rate,
            state_dropout_rate=self.state_dropout_rate,
            mogrifier_rounds=self.mogrifier_rounds,
            mogrifier_rank=self.mogrifier_rank,
            forget_bias=self.forget_bias,
            dtype=self.dtype,
            **options,
        )

    def initial_carry(self, batch_size: int, length: int | None):
        """Zeros, float32: for each layer a tuple of the arrays that its `state_shapes` tells of; the length does not matter."""
        del length
        layers = [self._layer(width, parent=None) for width in self.layer_dims]
        return {
            f"layer_{i}": tuple(jnp.zeros(shape) for shape in layer.state_shapes(batch_size)) for i, layer in enumerate(layers)
        }

    def __call__(self, x_BTD, carry=None, *, segments_BT=None, rows_B=None, train=False):
        """The output [B, T, H], and the carry after the last step (None if none was given)."""
        valid_TB = starts_TB = None
        if segments_BT is not None:
            valid_BT, runs_BT = segment_runs(segments_BT)
            valid_TB, starts_TB = valid_BT.T, jnp.diff(runs_BT, axis=1, prepend=0).T > 0
        states = self.initial_carry(x_BTD.shape[0], None) if carry is None else carry
        hidden = constrain(x_BTD.swapaxes(0, 1), None, ALL_ROWS)
        after, outputs = {}, []
        for layer, dropout in zip(self.layers, self.dropouts, strict=False):
            dropped = dropout(hidden, rows_B, train)
            hidden, after[layer.name] = layer(dropped, states[layer.name], valid_TB, starts_TB, train, rows_B)
            outputs.append(hidden)
        if self.skip_connections:
            hidden = sum(outputs)
        self.sow("intermediates", "last_hidden_BTH", hidden.swapaxes(0, 1))
        hidden = self.dropouts[-1](hidden, rows_B, train).swapaxes(0, 1)
        self.sow("intermediates", "dropped_hidden_BTH", hidden)
        if self.projected_dim is not None:
            hidden = self.projection(hidden)
        return hidden, None if carry is None else after
