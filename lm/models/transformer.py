"""The Transformer decoder: pre-norm blocks and their stack, whose carry is its key/value cache."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.errors import UserError
from lm.models.attention import Attention, empty_slots, places
from lm.models.layers import Dropout, FeedForward, Initializer, norm, sinusoidal
from lm.partition import ROWS, WIDTH, constrain

_KEPT = {"full": None, "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)) (pre-norm: Xiong et al. 2020, arXiv:2002.04745).

    On a mesh x lies split along its width between the branches, where Korthikanti et al. 2022 (arXiv:2205.05198) split time:
    as little is sent as with x whole on every device, and only a part of it is kept for the backward pass.
    """

    attention: nn.Module
    feed_forward: nn.Module
    norm: str
    dropout_rate: float
    variational: bool
    dtype: Any

    def setup(self):
        self.attention_norm, self.feed_forward_norm = norm(self.norm, self.dtype), norm(self.norm, self.dtype)
        kind = self.dropout_rate, 1 if self.variational else None
        self.attention_dropout, self.feed_forward_dropout = Dropout(*kind), Dropout(*kind)

    def __call__(self, x_BTD, where, cache, *, rows_B, train):
        mixed, cache = self.attention(self.attention_norm(x_BTD), where, cache, rows_B=rows_B, train=train)
        x_BTD = constrain(x_BTD + self.attention_dropout(mixed, rows_B, train), ROWS, None, WIDTH)
        inner = self.feed_forward(self.feed_forward_norm(x_BTD))
        return constrain(x_BTD + self.feed_forward_dropout(inner, rows_B, train), ROWS, None, WIDTH), cache


class TransformerStack(nn.Module):
    """Positions, blocks and a last norm.

    Attributes:
      num_layers, model_dim, num_heads, mlp_dim: L, D, H and F.
      activation: of the feed-forward layers.
      norm: "layer_norm" or "rms_norm".
      positions: "learned" (a table of max_positions rows), "sinusoidal", "rotary" or "relative".
      normed_queries: whether queries and keys are normalised, see `Attention`.
      attention_window: positions a token sees, itself included; None: all of its text.
      embedding_dropout_rate, dropout_rate, attention_dropout_rate: on the embeddings, on each residual branch, on the weights.
      variational: one mask for all tokens of a row, on embeddings and branches (as Transformer-XL on small corpora).
      scan_layers: one loop over the layers, for which their parameters are stacked in each step. Tracing does not grow with
        depth; and remat needs it on a CPU, where XLA merges what is made again with what was made unless a loop stands between.
      remat: what a block's backward pass makes again instead of keeping it: "none", "full" (all inside of it) or "matmuls"
        (all but the results of products with parameters). Chen et al. 2016, arXiv:1604.06174.
    """

    num_layers: int
    model_dim: int
    num_heads: int
    mlp_dim: int
    activation: str
    norm: str
    positions: str
    kernel_init: Initializer
    out_init: Initializer
    position_init: Initializer
    max_positions: int | None = None
    attention_window: int | None = None
    embedding_dropout_rate: float = 0.0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    variational: bool = False
    normed_queries: bool = False
    scan_layers: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        if self.positions == "learned":
            self.position_table = self.param("position_table", self.position_init, (self.max_positions, self.model_dim))
        self.embedding_dropout = Dropout(self.embedding_dropout_rate, 1 if self.variational else None)
        self.layers = [self._block(name=f"layer_{i}") for i in range(self.num_layers)]
        self.last_norm = norm(self.norm, self.dtype)

    def _block(self, **options):
        attention = Attention(
            model_dim=self.model_dim,
            num_heads=self.num_heads,
            rotary=self.positions == "rotary",
            kernel_init=self.kernel_init,
            out_init=self.out_init,
            dropout_rate=self.attention_dropout_rate,
            relative=self.positions == "relative",
            norm=self.norm if self.normed_queries else None,
            dtype=self.dtype,
            parent=None,
        )
        feed_forward = FeedForward(
            mlp_dim=self.mlp_dim,
            model_dim=self.model_dim,
            activation=self.activation,
            kernel_init=self.kernel_init,
            out_init=self.out_init,
            dtype=self.dtype,
            parent=None,
        )
        return Block(attention, feed_forward, self.norm, self.dropout_rate, self.variational, self.dtype, **options)

    def initial_carry(self, batch_size: int, length: int | None):
        """An empty cache: per layer keys and values [B, H, slots, K], and which position each slot holds.

        Args:
          length: positions that will be carried in all; None: without end.

        Raises:
          UserError: a length that a table of learned positions, or a cache without a window, cannot hold.
        """
        if self.positions == "learned" and (length is None or length > self.max_positions):
            raise UserError(
                f"learned positions end at model.max_positions {self.max_positions}, so "
                f"{'a stream without end' if length is None else f'{length} tokens'} cannot be carried; score in windows with "
                "evaluation.context, make the text shorter, or use rotary positions"
            )
        if length is None and self.attention_window is None:
            raise UserError(
                "a Transformer without model.attention_window would carry a cache as long as the text; set it, "
                "or score in windows with evaluation.context"
            )
        num_slots = min(size for size in (length, self.attention_window) if size is not None)
        shape = (batch_size, self.num_heads, num_slots, self.model_dim // self.num_heads)
        caches = {f"cache_{i}": (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for i in range(self.num_layers)}
        return {"slots": empty_slots(batch_size, num_slots), **caches}

    def __call__(self, x_BTD, carry=None, *, segments_BT=None, rows_B=None, train=False):
        """Hidden states [B, T, D], and the cache after the segment (None if none was given)."""
        where, slots = places(
            x_BTD.shape[:2], segments_BT, carry and carry["slots"], self.attention_window, self.positions == "relative"
        )
        if self.positions == "learned":
            if x_BTD.shape[1] > self.max_positions:
                raise UserError(f"a text of {x_BTD.shape[1]} tokens is longer than model.max_positions {self.max_positions}")
            x_BTD = x_BTD + self.position_table[where.positions_BT].astype(self.dtype)
        elif self.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoidal(where.positions_BT, self.model_dim).astype(self.dtype)
        hidden = self.embedding_dropout(x_BTD, rows_B, train)
        hidden, after = self._run_layers(hidden, where, carry, rows_B, train)
        return self.last_norm(hidden), None if carry is None else {"slots": slots, **after}

    def _run_layers(self, hidden_BTD, where, carry, rows_B, train):
        """The blocks, each a function of its own parameters and of a dropout key of its layer; and their caches."""
        names = [layer.name for layer in self.layers]
        if self.is_initializing():
            for layer in self.layers:
                hidden_BTD, _ = layer(hidden_BTD, where, None, rows_B=rows_B, train=False)
            return hidden_BTD, {}
        block = self._block(parent=None)
        shown = ["intermediates"] if self.is_mutable_collection("intermediates") else []
        key = self.make_rng("dropout") if train and self.has_rng("dropout") else None

        def run(hidden_BTD, layer):
            number, params, cache = layer
            options = {} if key is None else {"rngs": {"dropout": jax.random.fold_in(key, number)}}
            (hidden_BTD, cache), sown = block.apply(
                {"params": params}, hidden_BTD, where, cache, rows_B=rows_B, train=train, mutable=shown, **options
            )
            return hidden_BTD, (cache, sown)

        if train and self.remat != "none":
            run = jax.checkpoint(run, policy=_KEPT[self.remat])
        params = self.variables["params"]
        layers = [(number, params[name], carry and carry[f"cache_{number}"]) for number, name in enumerate(names)]
        if self.scan_layers and (carry is None or train):  # caches would be copied for every token that is generated
            hidden_BTD, stacked = jax.lax.scan(run, hidden_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
            results = [jax.tree.map(operator.itemgetter(number), stacked) for number in range(len(layers))]
        else:
            results = []
            for layer in layers:
                hidden_BTD, result = run(hidden_BTD, layer)
                results.append(result)
        for name, (_, sown) in zip(names, results, strict=True):
            if sown:
                self.put_variable("intermediates", name, sown["intermediates"])
        return hidden_BTD, {f"cache_{number}": cache for number, (cache, _) in enumerate(results)}
