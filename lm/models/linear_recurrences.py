"""Recurrences whose gates do not look at the state, so that all steps of a segment come at once: minGRU, minLSTM, mLSTM."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.models.layers import Initializer, gatewise, in_two_axes
from lm.models.products import Dense
from lm.partition import ALL_ROWS

Array = jax.Array
State = tuple[Array, ...]

_CHUNK = 256  # steps of an mLSTM that meet each other at once; a longer segment goes chunk by chunk
_NEVER = -1e30  # the logarithm of what is not there


def first_order(keep_TBH: Array, add_TBH: Array, state_BH: Array) -> Array:
    """h_t = keep_t h_{t-1} + add_t for all t, [T, B, H], by a parallel scan (Blelloch 1990)."""

    def after(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    kept_TBH, added_TBH = jax.lax.associative_scan(after, (keep_TBH, add_TBH))
    return kept_TBH * state_BH + added_TBH


class MinimalLayer(nn.Module):
    """minGRU and minLSTM (Feng et al. 2024, arXiv:2410.01201, sections 3.1 and 3.2).

    mingru: z = σ(x W_z + b), h = (1 - z) h' + z (x W_h + b).
    minlstm: f = σ(x W_f + b), i = σ(x W_i + b), h = f / (f + i) h' + i / (f + i) (x W_h + b).

    Attributes:
      name_of_cell: which.
      hidden_dim: H.
      forget_bias: initial bias of minlstm's f.
    """

    name_of_cell: str
    hidden_dim: int
    kernel_init: Initializer
    forget_bias: float = 0.0
    dtype: Any = jnp.float32

    def state_shapes(self, batch_size: int) -> list[tuple[int, ...]]:
        """Of what a row remembers: (h,), [B, H]."""
        return [(batch_size, self.hidden_dim)]

    @nn.compact
    def __call__(self, x_TBD: Array, state: State, valid_TB, starts_TB, train: bool, rows_B=None):
        """As of lm.models.recurrent.RecurrentLayer."""
        del train, rows_B
        num_gates = {"mingru": 2, "minlstm": 3}[self.name_of_cell]
        width = num_gates * self.hidden_dim
        kernel = self.param("input_kernel", gatewise(self.kernel_init, num_gates), (x_TBD.shape[-1], width))
        bias = self.param("bias", self._bias_init, (width,))
        gates_TBG = in_two_axes(lambda x: x @ kernel.astype(self.dtype), x_TBD, ALL_ROWS).astype(jnp.float32) + bias
        *gates, new_TBH = jnp.split(gates_TBG, num_gates, axis=-1)
        if self.name_of_cell == "mingru":
            keep_TBH, add_TBH = jax.nn.sigmoid(-gates[0]), jax.nn.sigmoid(gates[0]) * new_TBH
        else:
            # f / (f + i) as a sigmoid of the difference of logarithms, which neither overflows nor divides zero by zero
            share_TBH = jax.nn.log_sigmoid(gates[0]) - jax.nn.log_sigmoid(gates[1])
            keep_TBH, add_TBH = jax.nn.sigmoid(share_TBH), jax.nn.sigmoid(-share_TBH) * new_TBH
        if starts_TB is not None:
            keep_TBH = jnp.where(starts_TB[..., None], 0, keep_TBH)
        if valid_TB is not None:
            keep_TBH, add_TBH = jnp.where(valid_TB[..., None], keep_TBH, 1), jnp.where(valid_TB[..., None], add_TBH, 0)
        hidden_TBH = first_order(keep_TBH, add_TBH, state[0])
        return hidden_TBH.astype(self.dtype), (hidden_TBH[-1],)

    def _bias_init(self, key, shape, dtype=jnp.float32):
        del key
        bias = jnp.zeros(shape, dtype)
        return bias.at[: self.hidden_dim].set(self.forget_bias) if self.name_of_cell == "minlstm" else bias


class MatrixLayer(nn.Module):
    """mLSTM (Beck et al. 2024, arXiv:2405.04517, equations 19 to 27): a matrix as memory, for each of several heads.

    C = f C' + i v kᵀ, n = f n' + i k, h = o ⊙ norm(C q / max(|n·q|, 1)), with i = exp(x w_i + b), f = σ(x w_f + b),
    o = σ(x W_o + b) and k divided by sqrt(K). Memories are kept divided by exp(m), the largest factor in them so far
    (equations 15 to 17). Inside a chunk all steps meet at once, as in attention (appendix A.3).

    Attributes:
      hidden_dim, num_heads: H and N; keys, values and queries of a head are H / N wide.
      forget_bias: initial bias of the forget gates.
    """

    hidden_dim: int
    num_heads: int
    kernel_init: Initializer
    forget_bias: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        def dense(features, **options):
            return Dense(features, kernel_init=self.kernel_init, dtype=self.dtype, **options)

        self.query, self.key, self.value, self.out_gate = (dense(self.hidden_dim) for _ in range(4))
        self.write_gate = dense(self.num_heads)
        self.forget_gate = dense(self.num_heads, bias_init=nn.initializers.constant(self.forget_bias))
        self.head_norm = nn.LayerNorm(1e-6, use_bias=False, dtype=jnp.float32, reduction_axes=-1, feature_axes=(-2, -1))

    def state_shapes(self, batch_size: int) -> list[tuple[int, ...]]:
        """Of what a row remembers: (C, n, m), [B, N, K, K], [B, N, K] and [B, N]."""
        rows_heads, width = (batch_size, self.num_heads), self.hidden_dim // self.num_heads
        return [(*rows_heads, width, width), (*rows_heads, width), rows_heads]

    def __call__(self, x_TBD: Array, state: State, valid_TB, starts_TB, train: bool, rows_B=None):
        """As of lm.models.recurrent.RecurrentLayer."""
        del train, rows_B
        length, batch_size, _ = x_TBD.shape
        runs_TB = jnp.zeros((length, batch_size), jnp.int32)
        if starts_TB is not None:
            runs_TB = jnp.cumsum(starts_TB, axis=0, dtype=jnp.int32)

        def heads(project: Callable[[Array], Array]):
            found = in_two_axes(project, x_TBD, ALL_ROWS).reshape(length, batch_size, self.num_heads, -1)
            return found.transpose(1, 2, 0, 3)  # [B, N, T, ...]

        query, key, value = (heads(project) for project in (self.query, self.key, self.value))
        log_write, log_forget = (heads(gate)[..., 0].astype(jnp.float32) for gate in (self.write_gate, self.forget_gate))
        log_forget = jax.nn.log_sigmoid(log_forget)
        if valid_TB is not None:
            valid_B1T = valid_TB.T[:, None]
            log_write, log_forget = jnp.where(valid_B1T, log_write, _NEVER), jnp.where(valid_B1T, log_forget, 0)
        key = key * key.shape[-1] ** -0.5
        arguments = query, key, value, log_write, log_forget, runs_TB.T[:, None]
        read_BNTK, state = _chunk_by_chunk(arguments, state)
        read_TBH = self.head_norm(read_BNTK.transpose(2, 0, 1, 3)).reshape(length, batch_size, self.hidden_dim)
        gate_TBH = jax.nn.sigmoid(in_two_axes(self.out_gate, x_TBD, ALL_ROWS).astype(jnp.float32))
        return (gate_TBH * read_TBH).astype(self.dtype), state


def _chunk_by_chunk(arguments, state):
    """`_chunk` over pieces of at most `_CHUNK` steps, the last one filled up with padding."""
    length = arguments[0].shape[2]
    if length <= _CHUNK:
        return _chunk(*arguments, state)
    padding = -length % _CHUNK
    last_run = arguments[-1][:, :, -1:]

    def cut(x, fill=0.0):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), *[(0, 0)] * (x.ndim - 3)), constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, _CHUNK, *x.shape[3:]), 2, 0)

    *vectors, log_write, log_forget, runs = arguments
    runs = jnp.concatenate([runs, jnp.repeat(last_run, padding, axis=2)], axis=2)
    runs_C = jnp.moveaxis(runs.reshape(*runs.shape[:2], -1, _CHUNK), 2, 0)
    # what a chunk starts with belongs to the stretch that the one before it ended in
    carried_C = jnp.concatenate([jnp.zeros_like(runs_C[:1, ..., -1:]), runs_C[:-1, ..., -1:]])

    def one(state, chunk):
        read, state = _chunk(*chunk, state)
        return state, read

    chunks = *map(cut, vectors), cut(log_write, _NEVER), cut(log_forget), runs_C - carried_C
    state, read_CBNTK = jax.lax.scan(jax.checkpoint(one), state, chunks)
    read_BNTK = jnp.moveaxis(read_CBNTK, 0, 2).reshape(*arguments[0].shape[:2], -1, arguments[0].shape[3])
    return read_BNTK[:, :, :length], state


def _chunk(query, key, value, log_write, log_forget, runs, state):
    """What all steps of a chunk read [B, N, T, K], and the state after it.

    Args:
      query, key, value: [B, N, T, K].
      log_write, log_forget: [B, N, T].
      runs: [B, 1, T]; steps see those of the same number alone, those of number 0 what was carried in.
    """
    matrix_BNKK, vector_BNK, largest_BN = state
    length = query.shape[2]
    forgotten = jnp.cumsum(log_forget, axis=2)  # since the chunk's start
    seen = (runs[..., :, None] == runs[..., None, :]) & jnp.tril(jnp.ones((length, length), bool))
    factor = jnp.where(seen, forgotten[..., :, None] - forgotten[..., None, :] + log_write[..., None, :], _NEVER)
    carried = jnp.where(runs == 0, forgotten + largest_BN[..., None], _NEVER)
    largest = jnp.maximum(factor.max(axis=-1), carried)
    weights = jnp.exp(factor - largest[..., None])
    carried = jnp.exp(carried - largest)
    scores = jnp.einsum("bntk,bnsk->bnts", query, key, preferred_element_type=jnp.float32) * weights
    query_float = query.astype(jnp.float32)
    read = jnp.einsum("bnts,bnsk->bntk", scores, value.astype(jnp.float32))
    read += carried[..., None] * jnp.einsum("bntk,bnkv->bntv", query_float, matrix_BNKK)
    size = scores.sum(axis=-1) + carried * jnp.einsum("bntk,bnk->bnt", query_float, vector_BNK)
    # Where e^-largest would be infinite, all that is read vanishes beside it, and beside e^80 too.
    read /= jnp.maximum(jnp.abs(size), jnp.exp(jnp.minimum(-largest, 80.0)))[..., None]
    last, carried_last = weights[..., -1, :], carried[..., -1]
    written = last[..., None] * key.astype(jnp.float32)
    matrix_BNKK = carried_last[..., None, None] * matrix_BNKK
    matrix_BNKK += jnp.einsum("bntk,bntv->bnkv", written, value.astype(jnp.float32))
    return read, (matrix_BNKK, carried_last[..., None] * vector_BNK + written.sum(axis=2), largest[..., -1])
