"""Scorers: what perplexity needs of a model, for neural models and for n-grams alike."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from lm.data.batches import Batch
from lm.models.language_model import LanguageModel
from lm.models.ngram import Ngram, Tables
from lm.objectives import reset_rows
from lm.parallel import Placement

_SEGMENTS_AHEAD = 2


class Scorer(Protocol):
    """Scores segments in order; what it remembers of a row is its own affair."""

    def start(self, num_rows: int) -> Any:
        """The memory before the first segment."""

    def score(self, memory: Any, batch: Batch) -> tuple[Any, Any]:
        """Negative log likelihoods nll_BT (nats) of a segment's targets, for `fetch`, and the memory after it.

        Memory None means: every row starts empty, and None is returned.
        """

    def fetch(self, nll_BT: Any) -> np.ndarray:
        """What `score` gave, on the host; waits for the devices."""


def score_ahead(scorer: Scorer, memory: Any, segments: Iterable[tuple[Batch, Any]]) -> Iterator[tuple[np.ndarray, Any]]:
    """Scores segments in order; the devices get the next ones before the result of one is waited for.

    Args:
      scorer: of the model.
      memory: before the first segment.
      segments: batches, each with a note of the caller's.

    Yields:
      nll_BT of a batch, and its note.
    """
    underway: collections.deque[tuple[Any, Any]] = collections.deque()
    for batch, note in segments:
        nll_BT, memory = scorer.score(memory, batch)
        underway.append((nll_BT, note))
        if len(underway) > _SEGMENTS_AHEAD:
            nll_BT, note = underway.popleft()
            yield scorer.fetch(nll_BT), note
    for nll_BT, note in underway:
        yield scorer.fetch(nll_BT), note


@dataclasses.dataclass(frozen=True)
class NeuralScorer:
    """A neural model on its devices; made by `compiled_scorer`.

    Attributes:
      params: placed.
      compiled: (params, memory, batch) -> nll_BT, memory.
      empty: number of rows -> the memory before the first segment.
    """

    params: Any
    placement: Placement
    compiled: Callable
    empty: Callable[[int], Any]

    def start(self, num_rows):
        return self.placement.put_rows(jax.device_get(self.empty(num_rows)))

    def score(self, memory, batch):
        return self.compiled(self.params, memory, self.placement.put_rows(batch))

    def fetch(self, nll_BT):
        return self.placement.get_rows(nll_BT)


def neural_scorer(model: LanguageModel, placement: Placement, temperature: float = 1.0) -> Callable[[Any], NeuralScorer]:
    """Compiles scoring once; returns a function from placed parameters to their scorer.

    Args:
      temperature: divides the logits.
    """

    def score(params, memory, batch):
        log_prob_BT, memory = log_probs(model, params, reset_rows(memory, batch.reset_B), batch, temperature)
        return -log_prob_BT, memory

    return compiled_scorer(model, placement, score, model.initial_carry)


def compiled_scorer(
    model: LanguageModel, placement: Placement, score: Callable, empty: Callable
) -> Callable[[Any], NeuralScorer]:
    """Compiles a way of scoring, (params, memory, batch) -> nll_BT, memory; see `NeuralScorer`.

    In float32 the matmuls are computed at the highest precision, also where an accelerator would round their inputs.
    """
    compiled = placement.compile(precisely(model, score), ("rows", "rows"))
    return lambda params: NeuralScorer(params, placement, compiled, empty)


def precisely(model: LanguageModel, function: Callable) -> Callable:
    """The function, its matmuls in float32 at the highest precision where the model computes in float32."""

    @functools.wraps(function)
    def precise(*args):
        with jax.default_matmul_precision("highest" if precision_of(model) == "float32" else "default"):
            return function(*args)

    return precise


def precision_of(model: LanguageModel | Ngram) -> str:
    """What a stored figure says about the arithmetic behind it."""
    return "float64" if isinstance(model, Ngram) else str(np.dtype(model.embedding.dtype))


def log_probs(model: LanguageModel, params, carry, batch: Batch, temperature: float = 1.0, **options) -> tuple[jax.Array, Any]:
    """Log probabilities [B, T] of a batch's targets, nats, and the carry after it; `options` are a model call's."""
    hidden_BTD, carry = model.apply({"params": params}, batch.inputs_BT, carry, segments_BT=batch.segments_BT, **options)
    scores = model.apply({"params": params}, hidden_BTD, batch.targets_BT, temperature, method="score", **options)
    return scores.log_prob_BT, carry


@dataclasses.dataclass(frozen=True)
class NgramScorer:
    """An n-gram; its memory is the last order - 1 tokens of each row, -1 where there is none."""

    model: Ngram
    tables: Tables

    def start(self, num_rows):
        return np.full((num_rows, max(self.model.order - 2, 0)), -1, np.int64)

    def score(self, memory, batch):
        num_rows, length = batch.inputs_BT.shape
        before = self.start(num_rows) if memory is None else np.where(batch.reset_B[:, None], -1, memory)
        # inputs_BT[:, t] is the last token of the history of target t, so order - 2 tokens before it complete the history
        tokens = np.concatenate([before, batch.inputs_BT], axis=1)
        width = self.model.order - 1
        history = (
            np.lib.stride_tricks.sliding_window_view(tokens, width, axis=1) if width else np.zeros((num_rows, length, 0), int)
        )
        log_probs = self.model.log_probs(self.tables, history.reshape(num_rows * length, width), batch.targets_BT.reshape(-1))
        after = None if memory is None else tokens[:, tokens.shape[1] - before.shape[1] :]
        return -log_probs.reshape(num_rows, length), after

    def fetch(self, nll_BT):
        return nll_BT
