"""What several architectures share: initialisers, kinds of dropout, the embedding, norms, feed-forward, positions, segments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.xla_metadata import set_xla_metadata

from lm.models.products import Dense
from lm.partition import ROWS, VOCABULARY, constrain, count

Array = jax.Array
Initializer = Callable[..., Array]
_EPSILON = 1e-6  # of the norms


def initializer(name: str, scale: float) -> Initializer:
    """An initialiser by its name in the config.

    Args:
      name: one of lm.config.INITIALIZERS. Xavier: Glorot & Bengio 2010; He: He et al. 2015, arXiv:1502.01852;
        orthogonal: Saxe et al. 2014, arXiv:1312.6120.
      scale: half-width of "uniform", standard deviation of "normal"; the others take none.
    """
    if name == "uniform":
        return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -scale, scale)
    if name == "normal":
        return nn.initializers.normal(scale)
    return getattr(nn.initializers, name)()


def gatewise(init: Initializer, num_gates: int) -> Initializer:
    """Initialises each gate's block of a fused matrix [D, num_gates * H] as a matrix of its own."""

    def init_all(key, shape, dtype=jnp.float32):
        block = (shape[0], shape[1] // num_gates)
        return jnp.concatenate([init(k, block, dtype) for k in jax.random.split(key, num_gates)], axis=1)

    return init_all


def keep_mask(key: Array, shape: tuple[int, ...], rate: float) -> Array:
    """Random bool [*shape], True with probability 1 - rate, at a resolution of 2^-16.

    Two entries are made of each 32 random bits: threefry is what dropout costs on a CPU.
    """
    size = int(np.prod(shape))
    words = jax.random.bits(key, ((size + 1) // 2,), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size]
    return (halves >= min(round(rate * (1 << 16)), (1 << 16) - 1)).reshape(shape)


def row_keep_mask(key: Array, rows_B: Array, shape: tuple[int, ...], rate: float, row_axis: int = 0) -> Array:
    """`keep_mask` for every row from a key of its own, so that it depends on the global row and not on the device.

    Args:
      rows_B: int32 global row numbers.
      shape: of one row's mask.
      row_axis: where the rows stand in the result.
    """
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)
    return jax.vmap(lambda k: keep_mask(k, shape, rate), out_axes=row_axis)(keys)


class Dropout(nn.Module):
    """Dropout with inverted scaling (Srivastava et al. 2014), its mask keyed by step, place in the model and global row.

    Attributes:
      rate: share set to zero.
      constant_axis: an axis along which the mask stays the same: time for variational dropout (Gal & Ghahramani 2016,
        arXiv:1512.05287); None: every entry its own.
      row_axis: the axis of the rows.
    """

    rate: float
    constant_axis: int | None = None
    row_axis: int = 0

    def __call__(self, x: Array, rows_B: Array | None, train: bool) -> Array:
        if not train or not self.rate:
            return x
        if rows_B is None:
            rows_B = jnp.arange(x.shape[self.row_axis])
        shape = [1 if axis == self.constant_axis else size for axis, size in enumerate(x.shape)]
        del shape[self.row_axis]
        mask = row_keep_mask(self.make_rng("dropout"), rows_B, tuple(shape), self.rate, self.row_axis)
        return jnp.where(mask, x / (1 - self.rate), jnp.zeros((), x.dtype))


class WeightDrop(nn.Module):
    """DropConnect on a matrix (Merity et al. 2018, arXiv:1708.02182): one mask per step, shared by all rows and time steps."""

    rate: float

    def __call__(self, kernel: Array, train: bool) -> Array:
        if not train or not self.rate:
            return kernel
        return jnp.where(keep_mask(self.make_rng("dropout"), kernel.shape, self.rate), kernel / (1 - self.rate), 0)


class Embedding(nn.Module):
    """The table of token embeddings.

    Attributes:
      vocab_size, embed_dim: V and D.
      word_dropout_rate: share of the vocabulary whose embeddings are zero for a step (Gal & Ghahramani 2016), the same in all
        rows (Merity et al. 2018).
      multiplier: factor on the embedding (sqrt(D) beside sinusoidal positions, Vaswani et al. 2017).
    """

    vocab_size: int
    embed_dim: int
    table_init: Initializer
    word_dropout_rate: float = 0.0
    multiplier: float = 1.0
    dtype: Any = jnp.float32

    def setup(self):
        self.table = self.param("table", self.table_init, (self.vocab_size, self.embed_dim), jnp.float32)

    def __call__(self, tokens_BT: Array, train: bool = False) -> tuple[Array, Array]:
        """Embeddings [B, T, D] by look-up, and the table, from which a tied output reads on.

        The gradient that such an output has for the table passes through here, where the looked-up rows are added to it: so
        only one array of the table's size is made.
        """
        rows_BTD, table_VD = look_up(constrain(self.table, VOCABULARY), tokens_BT)
        return self._finished(rows_BTD, tokens_BT, train), table_VD

    def _finished(self, rows_BTD, tokens_BT, train):
        if train and self.word_dropout_rate:
            keep_V1 = keep_mask(self.make_rng("dropout"), (self.vocab_size, 1), self.word_dropout_rate)
            rows_BTD = jnp.where(keep_V1[tokens_BT], rows_BTD / (1 - self.word_dropout_rate), 0)
        return constrain(rows_BTD.astype(self.dtype) * self.multiplier, ROWS)


@jax.custom_vjp
def look_up(table_VD: Array, tokens_BT: Array) -> tuple[Array, Array]:
    """Rows of a table [B, T, D], and the table itself, whose cotangent takes up that of the rows."""
    return table_VD[tokens_BT], table_VD


def _look_up_forward(table_VD, tokens_BT):
    return look_up(table_VD, tokens_BT), tokens_BT


def _look_up_backward(tokens_BT, cotangents):
    d_rows_BTD, d_table_VD = cotangents
    return d_table_VD.at[tokens_BT].add(d_rows_BTD), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def norm(name: str, dtype: Any) -> nn.Module:
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) or RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), by name."""
    return {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[name](epsilon=_EPSILON, dtype=dtype)


def in_two_axes(product: Callable[[Array], Array], x: Array, rows: str = ROWS) -> Array:
    """product(x), for an x of three axes, by way of two: XLA's CPU backend runs matmuls and their gradients 1.1 to 1.6 times as
    fast. Where the rows are split over devices they cannot be one axis with another."""
    if count(rows) > 1:
        return product(x)
    return product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1)


class FeedForward(nn.Module):
    """The position-wise layers of a Transformer block: out(f(in(x))), or out(silu(gate(x)) * in(x)) for SwiGLU.

    ReLU: Vaswani et al. 2017. GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415, exact or by tanh. SwiGLU, without biases: Shazeer
    2020, arXiv:2002.05202.
    """

    mlp_dim: int
    model_dim: int
    activation: str
    kernel_init: Initializer
    out_init: Initializer
    dtype: Any = jnp.float32

    def setup(self):
        gated = self.activation == "swiglu"

        def dense(features, init):
            return Dense(features, use_bias=not gated, kernel_init=init, dtype=self.dtype)

        self.inward = dense(self.mlp_dim, self.kernel_init)
        self.outward = dense(self.model_dim, self.out_init)
        if gated:
            self.gate = dense(self.mlp_dim, self.kernel_init)

    def __call__(self, x_BTD: Array) -> Array:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])  # products of two axes: XLA's CPU backend runs them 1.2 times as fast
        inner_NF = self.inward(x_ND)
        if self.activation == "swiglu":
            return self.outward(nn.silu(self.gate(x_ND)) * inner_NF).reshape(x_BTD.shape)
        activation = {"relu": nn.relu, "gelu": _gelu, "gelu_tanh": nn.gelu}[self.activation]
        return self.outward(activation(inner_NF)).reshape(x_BTD.shape)


def _gelu(x):
    """By erf, in float32, since the sum 1 + erf cancels; by erfc, as in JAX, XLA would compute an exponential too."""
    exact = x.astype(jnp.float32)
    return (exact * (0.5 + 0.5 * jax.lax.erf(exact * 0.5**0.5))).astype(x.dtype)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function makes of the arguments; on a CPU before, and not in the loop of, what reads it.

    XLA would make it anew for each element that reads it, or in one loop with other exponentials, of which its CPU compiler makes
    no vector code.
    """
    if jax.default_backend() != "cpu":
        return function(*arguments)
    with set_xla_metadata(inlineable="false"):
        return jax.jit(function)(*arguments)


def angles(positions_BT: Array, width: int) -> Array:
    """Angles [B, T, width / 2] of position p and frequency 10000^(-2j / width) in [-π, π), to rounding at any position.

    p * frequency in float32 would lose digits in a long stream. Here an angle is counted in 2^-32 of a turn, so that
    integers overflow by whole turns; each byte of p has a step of its own, rounded once from float64.
    """
    turns = 10_000.0 ** (-np.arange(0, width, 2) / width) / (2 * np.pi)
    count = jnp.zeros((), jnp.uint32)
    for shift in (0, 8, 16, 24):
        step = np.round(np.remainder(turns * 2**shift, 1) * 2**32).astype(np.uint64).astype(np.uint32)
        byte_BT = (positions_BT >> shift) & 255
        count += byte_BT[:, :, None].astype(jnp.uint32) * step[None, None]
    return jax.lax.bitcast_convert_type(count, jnp.int32) * jnp.float32(2 * np.pi / 2**32)


def sinusoidal(positions_BT: Array, width: int) -> Array:
    """Sinusoidal position embeddings [B, T, width] (Vaswani et al. 2017, arXiv:1706.03762): all sines, then all cosines."""
    return apart(_sinusoids, angles(positions_BT, width))


def _sinusoids(turn_BTK):
    return jnp.concatenate([jnp.sin(turn_BTK), jnp.cos(turn_BTK)], axis=-1)


def rotate(x_BTHK: Array, positions_BT: Array) -> Array:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), entry j paired with entry j + K / 2.

    Args:
      positions_BT: leading axis 1 where all rows have the same.
    """
    turn_BTHK = sinusoidal(positions_BT, x_BTHK.shape[-1])[:, :, None].astype(x_BTHK.dtype)
    sine, cosine = jnp.split(turn_BTHK, 2, axis=-1)
    first, second = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def segment_runs(segments_BT: Array) -> tuple[Array, Array]:
    """Which tokens are valid, and in which stretch of equal segment numbers each stands.

    Padding (segment 0) interrupts no stretch. What was carried into a row belongs to its stretch 0.

    Returns:
      valid_BT bool, and runs_BT int32: 0 for the row's first stretch, one more at each change of number.
    """
    valid_BT = segments_BT > 0
    index_T = jnp.arange(segments_BT.shape[1])
    last_valid_BT = jax.lax.cummax(jnp.where(valid_BT, index_T, -1), axis=1)
    before_BT = jnp.pad(last_valid_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous_BT = jnp.where(before_BT < 0, segments_BT, jnp.take_along_axis(segments_BT, jnp.maximum(before_BT, 0), axis=1))
    return valid_BT, jnp.cumsum(valid_BT & (segments_BT != previous_BT), axis=1)
