"""Scaled dot-product attention over heads, its masks, and the key/value cache that it carries from segment to segment."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn, struct

from lm.models.layers import Dropout, Initializer, norm, rotate, segment_runs, sinusoidal
from lm.models.products import Dense, times
from lm.partition import HEADS, ROWS, count, locally

Array = jax.Array

_HEADWISE = (ROWS, None, HEADS)  # how [B, T, H, K] may be split
_MOST_BLOCKS = 8  # of queries, so that a long text does not make a long program
_SCORES_AT_ONCE = 1 << 24  # float32 numbers, 64 MiB, of which the half that is seen is kept for the backward pass


@struct.dataclass
class Places:
    """Where the tokens of a segment stand, shared by all layers.

    Attributes:
      positions_BT: int32 position of each token in its own text. Leading axis 1 where all rows have the same.
      visible_BTS: bool, whether a token sees a key; the keys are the cache's slots (if any), then the segment's tokens. A
        token that comes alone is in its slot before it looks, so its keys are the slots only. None: a token sees itself and
        all before it, the last `window` positions at most.
      window: see `places`.
      slots_BT: int32 slot of the cache that a token is written to, or the number of slots where it is not; None: no cache.
      distances_BTS: int32, how far behind a token each key stands, where it sees it; None: nobody asked.
    """

    positions_BT: Array
    visible_BTS: Array | None
    window: int | None = struct.field(pytree_node=False)
    slots_BT: Array | None = None
    distances_BTS: Array | None = None


@struct.dataclass
class Slots:
    """What is common to the caches of all layers: which token each slot holds. Empty is all zeros, as in every carry.

    Attributes:
      ordinal_BS: int32, position + 1 of the token in a slot, 0 where it is empty.
      next_B: int32, the position of the row's next token.
    """

    ordinal_BS: Array
    next_B: Array


def empty_slots(batch_size: int, num_slots: int) -> Slots:
    """The slots of a cache that holds nothing."""
    return Slots(jnp.zeros((batch_size, num_slots), jnp.int32), jnp.zeros((batch_size,), jnp.int32))


def places(
    shape: tuple[int, int], segments_BT: Array | None, slots: Slots | None, window: int | None, with_distances: bool = False
) -> tuple[Places, Slots | None]:
    """Positions, masks and places in the cache for a segment of tokens.

    A token sees itself and what stands before it in its own stretch of equal segment numbers, the last `window` positions
    at most. What was carried in belongs to a row's first stretch; only its last stretch is carried out. Position p is
    kept in slot p % num_slots, padding nowhere.

    Args:
      shape: (B, T).
      segments_BT: int32, 0 for padding; None: all valid.
      slots: of the cache; None: nothing is carried.
      window: positions that a token may see, itself included; None: all.
      with_distances: whether the places tell `visible_BTS` and `distances_BTS` in any case.

    Returns:
      The places, and the slots after the segment.
    """
    batch_size, length = shape
    if segments_BT is None and slots is None and not with_distances:
        return Places(jnp.arange(length, dtype=jnp.int32)[None], None, window), None
    if segments_BT is None:
        valid_BT, runs_BT = jnp.ones((1, length), bool), jnp.zeros((1, length), jnp.int32)
    else:
        valid_BT, runs_BT = segment_runs(segments_BT)
    count_BT = jnp.cumsum(valid_BT, axis=1)
    first_of_run_BT = jnp.diff(runs_BT, axis=1, prepend=0) > 0
    before_run_BT = jax.lax.cummax(jnp.where(first_of_run_BT, count_BT - 1, 0), axis=1)
    positions_BT = count_BT - 1 - before_run_BT
    if slots is not None:
        positions_BT = positions_BT + jnp.where(runs_BT == 0, slots.next_B[:, None], 0)

    def visible(key_positions, key_runs, key_valid):
        seen = key_valid[:, None, :] & (key_runs[:, None, :] == runs_BT[:, :, None])
        distance = positions_BT[:, :, None] - key_positions[:, None, :]
        seen &= distance >= 0
        return seen if window is None else seen & (distance < window), distance

    visible_BTS, distances_BTS = visible(positions_BT, runs_BT, valid_BT)
    if slots is None:
        return Places(positions_BT, visible_BTS, window, None, distances_BTS if with_distances else None), None

    num_slots = slots.ordinal_BS.shape[1]
    positions_BT, runs_BT, valid_BT = (jnp.broadcast_to(x, shape) for x in (positions_BT, runs_BT, valid_BT))
    last_run_B1 = runs_BT[:, -1:]
    kept_BT = valid_BT & (runs_BT == last_run_B1)
    next_B = jnp.max(jnp.where(kept_BT, positions_BT + 1, 0), axis=1)
    next_B = jnp.where(kept_BT.any(axis=1), next_B, slots.next_B)
    kept_BT &= positions_BT >= next_B[:, None] - num_slots
    slots_BT = jnp.where(kept_BT, positions_BT % num_slots, num_slots)
    kept_BS = jnp.where(last_run_B1 > 0, 0, slots.ordinal_BS)
    ordinal_BS = put(kept_BS[:, None], slots_BT, positions_BT[:, :, None] + 1)[:, 0]

    looked_at_BS = ordinal_BS if length == 1 else slots.ordinal_BS
    cached = visible(looked_at_BS - 1, jnp.zeros_like(looked_at_BS), looked_at_BS > 0)
    if length == 1:
        visible_BTS, distances_BTS = cached
    else:
        visible_BTS, distances_BTS = (
            jnp.concatenate([of_cache, jnp.broadcast_to(own, (batch_size, length, length))], axis=2)
            for of_cache, own in zip(cached, (visible_BTS, distances_BTS), strict=True)
        )
    distances_BTS = distances_BTS if with_distances else None
    return Places(positions_BT, visible_BTS, window, slots_BT, distances_BTS), Slots(ordinal_BS, next_B)


def put(cache_BHS: Array, slots_BT: Array, values_BTH: Array) -> Array:
    """Writes values [B, T, H, ...] into their slots of a cache [B, H, S, ...]; a slot past the end writes nothing.

    Rows and heads are one axis X meanwhile: beside an axis of length 1, XLA copies the cache instead of writing into it.
    """
    num_heads, *rest = cache_BHS.shape[1:]
    slots_XT = jnp.repeat(slots_BT, num_heads, axis=0)
    values_XT = values_BTH.swapaxes(1, 2).reshape(*slots_XT.shape, *rest[1:]).astype(cache_BHS.dtype)
    cache_XS, rows_X1 = cache_BHS.reshape(-1, *rest), jnp.arange(len(slots_XT))[:, None]
    return cache_XS.at[rows_X1, slots_XT].set(values_XT, mode="drop").reshape(cache_BHS.shape)


def attend(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, visible_BTS: Array, dropout=lambda weights: weights, shift_BHTS=0.0):
    """softmax(q k / sqrt(K) + shift) v (Vaswani et al. 2017, arXiv:1706.03762), the softmax in float32.

    A token that sees nothing (padding) gets the mean of all values; nothing that counts depends on it.

    Returns:
      The mixed values [B, T, H, K], and the weights [B, H, T, S] before dropout.
    """
    q_BHTK, k_BHSK, v_BHSK = _heads_first(q_BTHK, k_BSHK, v_BSHK)
    weights_BHTS = jax.nn.softmax(_scores(q_BHTK, k_BHSK, _hiding(visible_BTS)[:, None] + shift_BHTS))
    return jnp.matmul(dropout(weights_BHTS).astype(v_BHSK.dtype), v_BHSK).swapaxes(1, 2), weights_BHTS


def _heads_first(q_BTHK, k_BSHK, v_BSHK):
    """Queries over sqrt(K), keys and values, for plain batched matmuls: XLA's CPU backend runs them nearly twice as fast."""
    return tuple(x.swapaxes(1, 2) for x in (q_BTHK * q_BTHK.shape[-1] ** -0.5, k_BSHK, v_BSHK))


def _hiding(visible):
    """What is added to scores so that none counts that is not visible.

    The sum is that number then, whatever the score, as if it had been selected; and a sum goes into the loop of the product
    on a CPU, a selection does not.
    """
    return jnp.where(visible, 0.0, jnp.finfo(jnp.float32).min)


def _scores(q_BHTK, k_BHSK, bias_BHTS):
    if q_BHTK.shape[2] == 1:  # keys that many queries share are worth turning, those of one are read where they lie
        scores_BHTS = jnp.einsum("bhtk,bhsk->bhts", q_BHTK, k_BHSK, preferred_element_type=jnp.float32)
    else:
        scores_BHTS = jnp.matmul(q_BHTK, k_BHSK.swapaxes(2, 3), preferred_element_type=jnp.float32)
    return scores_BHTS + bias_BHTS


@jax.custom_vjp
def mix(q_BHTK: Array, k_BHSK: Array, v_BHSK: Array, bias_BHTS: Array) -> Array:
    """softmax(q k + bias) v [B, H, T, K] where nobody needs the weights: what they mix is divided by their sum, not they.

    Args:
      q_BHTK: divided by sqrt(K) already.
      bias_BHTS: float32, what is added to the scores; any axis may have length 1.
    """
    scores_BHTS = _scores(q_BHTK, k_BHSK, bias_BHTS)
    weights_BHTS = jnp.exp(scores_BHTS - scores_BHTS.max(axis=-1, keepdims=True))
    mixed_BHTK = jnp.matmul(weights_BHTS.astype(v_BHSK.dtype), v_BHSK, preferred_element_type=jnp.float32)
    return (mixed_BHTK / weights_BHTS.sum(axis=-1, keepdims=True)).astype(v_BHSK.dtype)


def _mix_forward(q_BHTK, k_BHSK, v_BHSK, bias_BHTS):
    weights_BHTS = jax.nn.softmax(_scores(q_BHTK, k_BHSK, bias_BHTS))
    mixed_BHTK = jnp.matmul(weights_BHTS.astype(v_BHSK.dtype), v_BHSK)
    return mixed_BHTK, (q_BHTK, k_BHSK, v_BHSK, bias_BHTS, weights_BHTS, mixed_BHTK)


def _mix_backward(kept, d_mixed_BHTK):
    """Dao et al. 2022, arXiv:2205.14135, appendix B.2: what the softmax takes off is a product of what was mixed, K wide."""
    q_BHTK, k_BHSK, v_BHSK, bias_BHTS, weights_BHTS, mixed_BHTK = kept
    taken_off_BHT1 = jnp.sum(d_mixed_BHTK.astype(jnp.float32) * mixed_BHTK, axis=-1, keepdims=True)
    d_weights_BHTS = jnp.matmul(d_mixed_BHTK, v_BHSK.swapaxes(2, 3), preferred_element_type=jnp.float32)
    d_scores_BHTS = weights_BHTS * (d_weights_BHTS - taken_off_BHT1)
    d_bias_BHTS = d_scores_BHTS.sum(axis=[axis for axis, size in enumerate(bias_BHTS.shape) if size == 1], keepdims=True)
    d_scores_BHTS, weights_BHTS = d_scores_BHTS.astype(q_BHTK.dtype), weights_BHTS.astype(v_BHSK.dtype)
    d_q_BHTK = jnp.matmul(d_scores_BHTS, k_BHSK)
    d_k_BHSK = jnp.matmul(q_BHTK.swapaxes(2, 3), d_scores_BHTS).swapaxes(2, 3)
    d_v_BHSK = jnp.matmul(d_mixed_BHTK.swapaxes(2, 3), weights_BHTS).swapaxes(2, 3)
    return d_q_BHTK, d_k_BHSK, d_v_BHSK, d_bias_BHTS


mix.defvjp(_mix_forward, _mix_backward)


def causal(first_query: int, num_queries: int, first_key: int, num_keys: int, window: int | None) -> Array:
    """bool [1, T, S]: whether a query sees a key, by their positions alone."""
    distance_TS = (first_query + jnp.arange(num_queries))[:, None] - (first_key + jnp.arange(num_keys))
    seen_TS = distance_TS >= 0 if window is None else (distance_TS >= 0) & (distance_TS < window)
    return seen_TS[None]


def attend_causally(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, window: int | None) -> Array:
    """`attend` where a token sees itself and the last `window` positions (None: all), and nobody asks for the weights.

    On a GPU in half precision this is cuDNN's flash attention. Elsewhere blocks of queries meet only the keys that some of
    them see, which spares half of a long text's arithmetic. Where the scores are many, some heads come at a time, and the
    backward pass makes their scores again instead of keeping them.
    """
    if _flash_takes(q_BTHK):
        before = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q_BTHK, k_BTHK, v_BTHK, is_causal=True, local_window_size=before, implementation="cudnn"
        )
    q_BHTK, k_BHTK, v_BHTK = _heads_first(q_BTHK, k_BTHK, v_BTHK)
    batch_size, num_heads, length, _ = q_BHTK.shape
    block = max(_queries_at_once(), math.ceil(length / _MOST_BLOCKS))
    at_once = max(1, _SCORES_AT_ONCE // length**2)
    total = batch_size * num_heads
    num_parts = next(n for n in range(1, total + 1) if total % n == 0 and total <= n * at_once)
    if num_parts == 1:
        return _mix_in_blocks(q_BHTK, k_BHTK, v_BHTK, window, block).swapaxes(1, 2)
    cut = [x.reshape(num_parts, -1, 1, *x.shape[2:]) for x in (q_BHTK, k_BHTK, v_BHTK)]
    mixed = jax.lax.map(jax.checkpoint(lambda qkv: _mix_in_blocks(*qkv, window, block)), cut)
    return mixed.reshape(q_BHTK.shape).swapaxes(1, 2)


def _queries_at_once():
    return 64 if jax.default_backend() == "cpu" else 256  # a CPU's cache holds their scores


def _flash_takes(q_BTHK):
    length, width = q_BTHK.shape[1], q_BTHK.shape[3]
    halves = q_BTHK.dtype in (jnp.bfloat16, jnp.float16)
    return halves and length % 2 == 0 and width % 8 == 0 and width <= 128 and _has_flash(jax.devices()[0])


def _has_flash(device):
    """cuDNN's kernels are for Ampere and what came after."""
    return device.platform == "gpu" and float(device.compute_capability) >= 8


def _mix_in_blocks(q_BHTK, k_BHTK, v_BHTK, window, block):
    length, mixed = q_BHTK.shape[2], []
    for start in range(0, length, block):
        end = min(start + block, length)
        first = 0 if window is None else max(0, start - window + 1)
        bias = _hiding(causal(start, end - start, first, end - first, window))[:, None]
        mixed.append(mix(q_BHTK[:, :, start:end], k_BHTK[:, :, first:end], v_BHTK[:, :, first:end], bias))
    return jnp.concatenate(mixed, axis=2)


class Attention(nn.Module):
    """Causal multi-head self-attention with a cache of keys and values.

    Where training carries the cache from step to step, it holds keys and values as they were made, and no gradient passes into
    it. Transformer-XL carries what they are made of and projects that again, so that its projections learn from the cache as
    well, at the cost of projecting it in every step.

    Attributes:
      model_dim, num_heads: D and H; heads are D / H wide.
      rotary: whether queries and keys are rotated by position (keys are cached rotated).
      relative: whether keys are looked up by their distance too (Dai et al. 2019, arXiv:1901.02860, section 3.3): the score is
        (q + u) k + (q + v) r, where u and v are biases of each head and r is a projection of the distance's sinusoids.
      norm: of queries and keys, each head for itself, before they are rotated (after Henry et al. 2020, arXiv:2010.04245, who
        scale what is normalised by one number of its own instead of 1/√K); None.
      dropout_rate: on the attention weights, every row and head with masks of its own.
    """

    model_dim: int
    num_heads: int
    rotary: bool
    kernel_init: Initializer
    out_init: Initializer
    dropout_rate: float = 0.0
    relative: bool = False
    norm: str | None = None
    dtype: Any = jnp.float32

    def setup(self):
        def dense(init, use_bias=True):
            return Dense(self.model_dim, use_bias=use_bias, kernel_init=init, dtype=self.dtype)

        self.query, self.key, self.value, self.outward = (
            dense(self.kernel_init),
            dense(self.kernel_init),
            dense(self.kernel_init),
            dense(self.out_init),
        )
        self.dropout = Dropout(self.dropout_rate)
        if self.relative:
            shape = self.num_heads, self.model_dim // self.num_heads
            self.content_bias, self.distance_bias = (
                self.param(name, nn.initializers.zeros, shape) for name in ("content_bias", "distance_bias")
            )
            self.distance = dense(self.kernel_init, use_bias=False)
        if self.norm is not None:
            self.query_norm, self.key_norm = norm(self.norm, self.dtype), norm(self.norm, self.dtype)

    def _by_distance(self, q_BTHK, where, num_keys):
        """What a key's distance adds to its scores, [B, H, T, S]."""
        length = num_keys if where.window is None else min(num_keys, where.window)
        shape = length, self.num_heads, q_BTHK.shape[-1]
        sinusoids_SD = sinusoidal(jnp.arange(length)[None], self.model_dim)[0].astype(self.dtype)
        query_BTHK = (q_BTHK + self.distance_bias.astype(self.dtype)) * q_BTHK.shape[-1] ** -0.5
        by_distance_BHTS = jnp.einsum(
            "bthk,shk->bhts", query_BTHK, self.distance(sinusoids_SD).reshape(shape), preferred_element_type=jnp.float32
        )
        index_BTS = jnp.clip(where.distances_BTS, 0, length - 1)
        return jnp.take_along_axis(by_distance_BHTS, index_BTS[:, None], axis=-1)

    def _projected(self, x_ND, alone):
        """Queries, keys and values [B * T, D] each; on a CPU of a token that comes alone by one product, whose matrix XLA joins
        once before a loop over tokens."""
        projections = self.query, self.key, self.value
        if not alone or jax.default_backend() != "cpu" or count(HEADS) > 1:
            return [project(x_ND) for project in projections]
        params = [project.variables["params"] for project in projections]
        kernel, bias = (jnp.concatenate([p[name] for p in params], axis=-1).astype(self.dtype) for name in ("kernel", "bias"))
        return jnp.split(times(x_ND, kernel) + bias, 3, axis=-1)

    def __call__(self, x_BTD, where: Places, cache=None, *, rows_B=None, train=False):
        """Attends from every token to what it may see; sows `attention_weights` [B, H, T, S] to `intermediates`.

        Args:
          where: positions, masks and slots of the tokens.
          cache: (keys, values), [B, H, slots, K] each, in the order that `attend` multiplies; None: nothing is carried.

        Returns:
          The mixed values [B, T, D], and the cache after the segment.
        """
        heads = (*x_BTD.shape[:2], self.num_heads, self.model_dim // self.num_heads)
        x_ND = x_BTD.reshape(-1, self.model_dim)  # as in FeedForward
        alone = cache is not None and x_BTD.shape[1] == 1
        q, k, v = (projected.reshape(heads) for projected in self._projected(x_ND, alone))
        if self.norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary:
            q, k = rotate(q, where.positions_BT), rotate(k, where.positions_BT)
        keys, values, after = k, v, None
        if cache is not None:
            after = tuple(put(old, where.slots_BT, new) for old, new in zip(cache, (k, v), strict=True))
            if alone:  # a cache that is only read where it lies, not copied for every token that is generated
                keys, values = (cached.astype(k.dtype).swapaxes(1, 2) for cached in after)
            else:
                keys, values = (
                    jnp.concatenate([old.astype(new.dtype), new.swapaxes(1, 2)], axis=2).swapaxes(1, 2)
                    for old, new in zip(cache, (k, v), strict=True)
                )
        needs_weights = self.is_mutable_collection("intermediates") or (train and self.dropout_rate)
        if where.visible_BTS is None and not needs_weights:
            attend_here = locally(lambda _, *qkv: attend_causally(*qkv, where.window), (_HEADWISE,) * 3, _HEADWISE)
            mixed = attend_here(q, keys, values)
        else:
            visible_BTS = where.visible_BTS
            if visible_BTS is None:
                visible_BTS = causal(0, x_BTD.shape[1], 0, x_BTD.shape[1], where.window)
            query, shift = q, 0.0
            if self.relative:
                query, shift = q + self.content_bias.astype(self.dtype), self._by_distance(q, where, keys.shape[1])
            if needs_weights:
                drop = functools.partial(self.dropout, rows_B=rows_B, train=train)
                mixed, weights = attend(query, keys, values, visible_BTS, drop, shift)
                self.sow("intermediates", "attention_weights", weights)
            else:
                mixed = mix(*_heads_first(query, keys, values), _hiding(visible_BTS)[:, None] + shift).swapaxes(1, 2)
        return self.outward(mixed.reshape(x_ND.shape)).reshape(x_BTD.shape), after
