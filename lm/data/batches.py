"""Batches as pure functions of (seed, step, rows): streams, shuffled windows, documents; and their way to the device."""

import queue
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from flax import struct

from lm.config import Config
from lm.data.corpus import Corpus
from lm.errors import UserError


@struct.dataclass
class Batch:
    """One step's rows. Meaning is global; a host or device holds some of the rows.

    Attributes:
      inputs_BT, targets_BT: int32; the target is the token after the input.
      loss_weights_BT: float32; what counts in the loss, and nothing else.
      segments_BT: int32, 0 for padding, equal numbers may see each other; None: everything is valid (static).
      reset_B: bool; empty this row's carry first.
      rows_B: int32, global row numbers, which key dropout.
    """

    inputs_BT: Any
    targets_BT: Any
    loss_weights_BT: Any
    segments_BT: Any
    reset_B: Any
    rows_B: Any


class BatchSource(Protocol):
    """Attributes: `shapes`, every (B, T) that occurs, one compilation each; `carries`, whether state goes from step to step;
    `steps_per_epoch` and `tokens_per_step` (padding left out, the mean over an epoch), exact."""

    shapes: tuple[tuple[int, int], ...]
    carries: bool
    steps_per_epoch: int | Fraction
    tokens_per_step: int | Fraction

    def epoch(self, step: int) -> int:
        """Number of the epoch, from 0, that a step's first row belongs to."""

    def batch(self, step: int, rows: slice) -> Batch:
        """The given rows of a step's batch, in NumPy; pure."""


class _Source:
    def __init__(self, corpus: Corpus, batch_size: int, seq_len: int, seed: int):
        self.tokens, self.eos, self.seed = corpus.tokens, corpus.eos, seed
        self.batch_size, self.seq_len = batch_size, seq_len
        self.shapes = ((batch_size, seq_len),)
        self.tokens_per_step: int | Fraction = batch_size * seq_len
        self.num_rows = self._lay_out(corpus)
        if self.num_rows < batch_size:
            raise UserError(
                f"{corpus.name} holds {len(corpus.tokens)} tokens, fewer than one batch of config.data.batch_size {batch_size} × "
                f"config.data.seq_len {seq_len} = {batch_size * seq_len}; make one of them smaller"
            )

    def _lay_out(self, corpus):
        """Number of rows that the corpus fills."""
        return len(corpus.tokens) // self.seq_len

    def _batch(self, starts, rows, reset):
        """Rows that predict `tokens[start : start + seq_len]`, each token from the one before it, the first from `eos`."""
        targets = np.stack([self.tokens[s : s + self.seq_len] for s in starts]).astype(np.int32)
        first = np.array([self.tokens[s - 1] if s else self.eos for s in starts], np.int32)
        return Batch(
            inputs_BT=np.concatenate([first[:, None], targets[:, :-1]], axis=1),
            targets_BT=targets,
            loss_weights_BT=np.ones(targets.shape, np.float32),
            segments_BT=None,
            reset_B=np.full(len(starts), reset),
            rows_B=np.asarray(rows, np.int32),
        )


class Stream(_Source):
    """Contiguous rows: row r reads the r-th of `batch_size` equal stretches of the corpus, `seq_len` tokens a step.

    The carry goes from step to step and is emptied where an epoch begins. The tokens that fill no whole row, and those
    that fill no whole step, are left out of training (never of evaluation).
    """

    carries = True

    def __init__(self, corpus, batch_size, seq_len, seed):
        super().__init__(corpus, batch_size, seq_len, seed)
        self.row_length = len(corpus.tokens) // batch_size
        self.steps_per_epoch = self.row_length // seq_len

    def epoch(self, step):
        return step // self.steps_per_epoch

    def batch(self, step, rows):
        within = step % self.steps_per_epoch
        rows = range(self.batch_size)[rows]
        return self._batch([row * self.row_length + within * self.seq_len for row in rows], rows, reset=within == 0)


class Windows(_Source):
    """Shuffled windows of `seq_len` tokens, every one once an epoch, in an order of its own each epoch.

    Example `i = step * batch_size + row` is window `permutation_epoch(i % n)` of epoch `i // n`; the permutation is a
    function (grain's index_shuffle), so any step is reached at once and nothing is stored.
    """

    carries = False

    def __init__(self, corpus, batch_size, seq_len, seed):
        super().__init__(corpus, batch_size, seq_len, seed)
        self.num_windows = self.num_rows
        self.steps_per_epoch = Fraction(self.num_windows, batch_size)

    def epoch(self, step):
        return step * self.batch_size // self.num_windows

    def _windows(self, step, rows):
        """Numbers of the windows in some rows of a step."""
        from grain.experimental import index_shuffle

        windows = []
        for row in rows:
            epoch, index = divmod(step * self.batch_size + row, self.num_windows)
            seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
            windows.append(
                index_shuffle(index, max_index=self.num_windows - 1, seed=seed, rounds=4) if self.num_windows > 1 else 0
            )
        return np.array(windows)

    def batch(self, step, rows):
        rows = range(self.batch_size)[rows]
        return self._batch(self._windows(step, rows) * self.seq_len, rows, reset=True)


class Packed(Windows):
    """The same windows, in which a document sees nothing of the one before it: a segment ends with its `eos`."""

    def batch(self, step, rows):
        batch = super().batch(step, rows)
        ends_BT = batch.targets_BT == self.eos
        return batch.replace(segments_BT=(1 + np.cumsum(ends_BT, axis=1) - ends_BT).astype(np.int32))


class Padded(Windows):
    """A document a row, shuffled; a longer one in pieces of `seq_len` tokens, a shorter one padded at its end.

    Padding is no segment and has no weight in the loss.
    """

    def __init__(self, corpus, batch_size, seq_len, seed):
        super().__init__(corpus, batch_size, seq_len, seed)
        self.tokens_per_step = Fraction(len(corpus.tokens)) / self.steps_per_epoch

    def _lay_out(self, corpus):
        ends_D = np.flatnonzero(corpus.tokens == corpus.eos) + 1
        self._ends_D = ends_D if len(ends_D) and ends_D[-1] == len(corpus.tokens) else np.append(ends_D, len(corpus.tokens))
        self._starts_D = np.concatenate([[0], self._ends_D[:-1]])
        pieces_D = -(-(self._ends_D - self._starts_D) // self.seq_len)
        self._first_piece_D = np.cumsum(pieces_D) - pieces_D
        return int(pieces_D.sum())

    def batch(self, step, rows):
        rows = range(self.batch_size)[rows]
        pieces_B = self._windows(step, rows)
        documents_B = np.searchsorted(self._first_piece_D, pieces_B, side="right") - 1
        starts_B = self._starts_D[documents_B] + (pieces_B - self._first_piece_D[documents_B]) * self.seq_len
        ends_B = self._ends_D[documents_B]
        index_BT = starts_B[:, None] + np.arange(self.seq_len)
        there_BT = index_BT < ends_B[:, None]
        targets_BT = np.where(there_BT, self.tokens[np.minimum(index_BT, len(self.tokens) - 1)], 0)
        first_B = np.where(starts_B > 0, self.tokens[np.maximum(starts_B - 1, 0)], self.eos)
        return Batch(
            inputs_BT=np.concatenate([first_B[:, None], targets_BT[:, :-1]], axis=1).astype(np.int32),
            targets_BT=targets_BT.astype(np.int32),
            loss_weights_BT=there_BT.astype(np.float32),
            segments_BT=there_BT.astype(np.int32),
            reset_B=np.ones(len(rows), bool),
            rows_B=np.asarray(rows, np.int32),
        )


def batches(config: Config, corpus: Corpus) -> BatchSource:
    """The configured source of training batches over a corpus."""
    kind = {"stream": Stream, "windows": Windows, "packed": Packed, "padded": Padded}[config.data.order]
    return kind(corpus, config.data.batch_size, config.data.seq_len, config.seed)


def prefetch(make: Callable[[int], Any], first: int, last: int, depth: int) -> Iterator[Any]:
    """Yields `make(step)` for first <= step < last, made ahead in a thread.

    Args:
      make: step -> batch, already on the device.
      depth: batches to hold ready; 0 makes each when it is asked for.
    """
    if depth == 0:
        yield from map(make, range(first, last))
        return
    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work():
        try:
            for step in range(first, last):
                if stop.is_set():
                    return
                put((make(step), None))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(first, last):
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
