"""A neural language model: an embedding, a stack of layers and an output, whatever the stack is made of."""

from typing import Any, NamedTuple

import jax
from flax import linen as nn

from lm.models.output import LossSums, TokenScores

Array = jax.Array


class Output(NamedTuple):
    """hidden_BTD, and what the model remembers afterwards (None if no carry was given)."""

    hidden_BTD: Array
    carry: Any


class LanguageModel(nn.Module):
    """tokens, carry -> hidden, carry; and hidden -> logits or scores.

    Attributes:
      embedding, stack, output: the parts; they name the scopes of the parameters.
    """

    embedding: nn.Module
    stack: nn.Module
    output: nn.Module

    def initial_carry(self, batch_size: int, length: int | None = None):
        """An empty carry: all zeros, axis 0 of every leaf the row; needs no parameters.

        Args:
          length: tokens that will be carried in all; None: without end.
        """
        return self.stack.initial_carry(batch_size, length)

    def __call__(self, inputs_BT, carry=None, *, segments_BT=None, rows_B=None, train=False) -> Output:
        """Runs the model over a segment.

        Args:
          inputs_BT: int32 tokens.
          carry: what the rows remember; None: start empty and return None.
          segments_BT: int32, 0 for padding, a change of number starts empty; None: all valid.
          rows_B: int32 global row numbers, which key dropout.
          train: whether dropout is on; needs the `dropout` random stream.
        """
        x_BTD, _ = self.embedding(inputs_BT, train)
        return Output(*self.stack(x_BTD, carry, segments_BT=segments_BT, rows_B=rows_B, train=train))

    def loss_sums(
        self,
        inputs_BT,
        targets_BT,
        weights_BT,
        carry=None,
        *,
        label_smoothing: float = 0.0,
        segments_BT=None,
        rows_B=None,
        train=False,
    ) -> tuple[LossSums, Any]:
        """Runs the model over a segment and sums the losses of its targets, [B, T] like the inputs.

        Args:
          weights_BT: float32, what each token counts.
          label_smoothing: see lm.models.output.
          carry, segments_BT, rows_B, train: as in a call.

        Returns:
          The sums, and the carry afterwards.
        """
        x_BTD, table_VD = self.embedding(inputs_BT, train)
        hidden_BTD, carry = self.stack(x_BTD, carry, segments_BT=segments_BT, rows_B=rows_B, train=train)
        read = self.output.read(hidden_BTD, rows_B, train)
        return self.output.loss_sums(read, targets_BT, weights_BT, table_VD, label_smoothing), carry

    def logits(self, hidden_BTD: Array) -> Array:
        """float32 [B, T, V]."""
        return self.output.logits(self.output.read(hidden_BTD), self.embedding.table)

    def score(self, hidden_BTD: Array, targets_BT: Array, temperature: float = 1.0, *, rows_B=None, train=False) -> TokenScores:
        """Scores of the targets [B, T], with logits divided by the temperature; `rows_B` and `train` as in a call."""
        return self.output.score(self.output.read(hidden_BTD, rows_B, train), targets_BT, self.embedding.table, temperature)

    def touch_all(self, inputs_BT: Array) -> Array:
        """Runs everything that has parameters; for initialisation."""
        return self.logits(self(inputs_BT).hidden_BTD)
