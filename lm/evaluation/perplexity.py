"""Scoring a whole split: every token exactly once, in corpus order, whatever the batching; and the figures that follow."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lm.data.batches import Batch
from lm.data.corpus import Corpus
from lm.evaluation.scorers import Scorer, score_ahead


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a split is laid out for scoring.

    Attributes:
      context: tokens of a window, each of which starts empty; None: state is carried along the stream.
      stride: tokens scored in each window after the first; the others of a window are its left context.
      rows: windows scored together; with a carry, parallel streams (1 for a final figure: more of them start anew at
        their seams).
      row_multiple: rows are filled up to a multiple of this with empty ones, so that devices can share them.
      segment: tokens that a carried stream advances at a time; the figure does not depend on it.
    """

    context: int | None = None
    stride: int | None = None
    rows: int = 1
    row_multiple: int = 1
    segment: int = 256

    @property
    def filled_rows(self) -> int:
        """Rows of a batch, the empty ones counted."""
        return -(-self.rows // self.row_multiple) * self.row_multiple


def token_losses(
    scorer: Scorer, corpus: Corpus, layout: Layout, progress: Callable[[int], Any] = lambda scored: None
) -> np.ndarray:
    """Negative log likelihood of every token of a split, nats, float32 [N], in corpus order.

    Args:
      scorer: of the model.
      corpus: the split.
      layout: context and batching.
      progress: called with the number of tokens scored since the last call.
    """
    nll_N, num_scored = np.zeros(len(corpus.tokens), np.float32), 0
    memory = None if layout.context else scorer.start(layout.filled_rows)
    for nll_BT, index_BT in score_ahead(scorer, memory, _batches(corpus, layout)):
        scored = index_BT >= 0
        nll_N[index_BT[scored]] = nll_BT[scored]
        num_scored += int(scored.sum())
        progress(int(scored.sum()))
    assert num_scored == len(nll_N), f"{num_scored} tokens scored of {len(nll_N)}"
    return nll_N


def _batches(corpus, layout) -> Iterator[tuple[Batch, np.ndarray]]:
    """Batches, and for each place the index of the token to be noted, -1 where none is."""
    total = len(corpus.tokens)
    steps = np.arange(min(layout.context or layout.segment, total))
    rows_B = np.arange(layout.filled_rows)
    if layout.context is None:
        length = math.ceil(total / layout.rows)
        starts_B = rows_B * length  # those of the empty rows lie beyond the end
        ends_B = np.minimum(starts_B + length, total)
        for offset in range(0, length, len(steps)):
            yield _batch(corpus, rows_B, starts_B + offset, ends_B, starts_B + offset, steps, reset=offset == 0)
        return
    num_windows = 1 + max(math.ceil((total - layout.context) / layout.stride), 0)
    for first in range(0, num_windows, layout.rows):
        windows_B = first + rows_B
        there_B = (windows_B < num_windows) & (rows_B < layout.rows)
        starts_B = np.where(there_B, windows_B * layout.stride, total)
        scored_B = np.where(windows_B == 0, 0, starts_B + layout.context - layout.stride)
        yield _batch(corpus, windows_B, starts_B, np.full(len(rows_B), total), scored_B, steps, reset=True)


def _batch(corpus, rows_B, starts_B, ends_B, scored_from_B, steps_T, reset):
    index_BT = starts_B[:, None] + steps_T
    there_BT = index_BT < ends_B[:, None]
    index_BT = np.where(there_BT, index_BT, 0)
    # Padding stands at the right, where a causal model cannot see it and no carry is read any more.
    targets_BT = np.where(there_BT, corpus.tokens[index_BT], 0).astype(np.int32)
    inputs_BT = np.where(index_BT > 0, corpus.tokens[np.maximum(index_BT - 1, 0)], corpus.eos).astype(np.int32)
    batch = Batch(
        inputs_BT=inputs_BT,
        targets_BT=targets_BT,
        loss_weights_BT=there_BT.astype(np.float32),
        segments_BT=None,
        reset_B=np.full(len(starts_B), reset),
        rows_B=rows_B.astype(np.int32),  # of windows their number: how many are scored at once decides no dropout mask
    )
    return batch, np.where(there_BT & (index_BT >= scored_from_B[:, None]), index_BT, -1)


def figures(nll_N: np.ndarray, num_bytes: int, num_words: int) -> dict[str, float | None]:
    """Sums first, in float64; one division and one exp each.

    Args:
      nll_N: nats of every token.
      num_bytes, num_words: of the original text, so that bits_per_byte and word_perplexity (None where there are no words)
        do not depend on the tokenizer.
    """
    total = float(np.sum(nll_N, dtype=np.float64))
    return {
        "loss": total / len(nll_N),
        "perplexity": perplexity(total / len(nll_N)),
        "bits_per_byte": total / math.log(2) / num_bytes,
        "word_perplexity": perplexity(total / num_words) if num_words else None,
        "nll_sum": total,
    }


def perplexity(loss: float) -> float:
    """exp(loss); at most e^700, which float64 and JSON can still hold."""
    return math.exp(min(loss, 700.0))
