"""Batches as pure functions of (seed, step, rows): streams, shuffled windows, documents, and mixtures of several corpora."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from flax import struct

from lm.config import Config
from lm.data.corpus import Corpus
from lm.data.shards import pieces
from lm.errors import UserError

_OF_MIXTURE, _OF_LENGTHS = 1, 2  # tell the seeds of a mixture's order and of random lengths from those of windows
_HALVED = 0.05  # share of random lengths that are drawn around half of the mean
_SHORTEST = 5  # of random lengths, in tokens


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
    `steps_per_epoch` and `tokens_per_step` (padding left out, the mean over an epoch), exact; the epochs of a mixture are
    those of its first part."""

    shapes: tuple[tuple[int, int], ...]
    carries: bool
    steps_per_epoch: int | Fraction
    tokens_per_step: int | Fraction

    def epoch(self, step: int) -> int:
        """Number of the epoch, from 0, that a step's first row belongs to."""

    def batch(self, step: int, rows: slice) -> Batch:
        """The given rows of a step's batch, in NumPy; pure."""

    def counts(self, num_steps: int) -> dict[str, int]:
        """For a line of metrics: of a mixture, the tokens that the first steps took from each part (of padded documents, as
        many as they hold on average); else nothing."""


class _Source:
    def __init__(self, corpus: Corpus, batch_size: int, seq_len: int, seed: int):
        self.tokens, self.eos, self.seed = corpus.tokens, corpus.eos, seed
        self.batch_size, self.seq_len = batch_size, seq_len
        self.shapes = ((batch_size, seq_len),)
        self.tokens_per_step: int | Fraction = batch_size * seq_len
        self.num_rows = self._lay_out(corpus)
        if self.num_rows < batch_size:
            raise UserError(
                f"{corpus.name} holds {len(corpus.tokens)} tokens, too few for {batch_size} rows of config.data.seq_len "
                f"{seq_len}; make that or config.data.batch_size smaller"
            )

    def _lay_out(self, corpus):
        """Number of rows that the corpus fills."""
        return len(corpus.tokens) // self.seq_len

    def counts(self, num_steps):
        del num_steps
        return {}

    def _batch(self, starts, rows, reset, length=None):
        """Rows that predict `tokens[start : start + length]` (None: seq_len), each from the one before, the first from `eos`."""
        targets = np.stack([self.tokens[s : s + (length or self.seq_len)] for s in starts]).astype(np.int32)
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
        return self.rows(step, range(self.batch_size)[rows])

    def rows(self, step: int, rows: Sequence[int]) -> Batch:
        """Rows of a step by their numbers."""
        within = step % self.steps_per_epoch
        return self._batch([row * self.row_length + within * self.seq_len for row in rows], rows, reset=within == 0)


class StreamOfRandomLengths(Stream):
    """A stream whose steps differ in length (Merity et al. 2017, arXiv:1708.02182, section 4.1), padded to a few lengths.

    The lengths of an epoch are drawn once, from the seed; each epoch takes the same ones in an order of its own, so that all
    epochs have as many steps and any step is reached at once. All of a row is read.
    """

    def __init__(self, corpus, batch_size, seq_len, seed, std: float):
        super().__init__(corpus, batch_size, seq_len, seed)
        self._lengths_S = random_lengths(self.row_length, seq_len, std, (seed, _OF_LENGTHS))
        self.steps_per_epoch = len(self._lengths_S)
        self.tokens_per_step = Fraction(self.row_length * batch_size, self.steps_per_epoch)
        self._unit = math.ceil(2 * std)
        self.shapes = tuple((batch_size, length) for length in sorted({self._padded(length) for length in self._lengths_S}))
        self._order = functools.lru_cache(4)(self._order_of_epoch)

    def rows(self, step, rows):
        epoch, within = divmod(step, self.steps_per_epoch)
        starts_S, lengths_S = self._order(epoch)
        start, length = int(starts_S[within]), int(lengths_S[within])
        batch = self._batch([row * self.row_length + start for row in rows], rows, reset=within == 0, length=length)
        padding = (0, 0), (0, self._padded(length) - length)
        return batch.replace(
            inputs_BT=np.pad(batch.inputs_BT, padding),
            targets_BT=np.pad(batch.targets_BT, padding),
            loss_weights_BT=np.pad(batch.loss_weights_BT, padding),
            segments_BT=np.pad(np.ones_like(batch.inputs_BT), padding),
        )

    def _padded(self, length):
        return -(-length // self._unit) * self._unit

    def _order_of_epoch(self, epoch):
        lengths_S = np.random.default_rng((self.seed, epoch, _OF_LENGTHS)).permutation(self._lengths_S)
        return np.cumsum(lengths_S) - lengths_S, lengths_S


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

    def batch(self, step, rows):
        rows = range(self.batch_size)[rows]
        return self.examples([step * self.batch_size + row for row in rows], rows)

    def examples(self, examples: Sequence[int], rows: Sequence[int]) -> Batch:
        """The windows of some examples, as the rows of those numbers."""
        return self._batch(self._windows(examples) * self.seq_len, rows, reset=True)

    def _windows(self, examples):
        """Numbers of the windows that examples are."""
        found = []
        for example in examples:
            epoch, index = divmod(example, self.num_windows)
            found.append(shuffled(index, self.num_windows, (self.seed, epoch)))
        return np.array(found, np.int64)


class Packed(Windows):
    """The same windows, in which a document sees nothing of the one before it: a segment ends with its `eos`."""

    def examples(self, examples, rows):
        batch = super().examples(examples, rows)
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
        found, before = [np.zeros(0, np.int64)], 0
        for piece in pieces(corpus.tokens):
            found.append(np.flatnonzero(piece == corpus.eos) + before + 1)
            before += len(piece)
        ends_D = np.concatenate(found)
        self._ends_D = ends_D if len(ends_D) and ends_D[-1] == len(corpus.tokens) else np.append(ends_D, len(corpus.tokens))
        self._starts_D = np.concatenate([[0], self._ends_D[:-1]])
        pieces_D = -(-(self._ends_D - self._starts_D) // self.seq_len)
        self._first_piece_D = np.cumsum(pieces_D) - pieces_D
        return int(pieces_D.sum())

    def examples(self, examples, rows):
        pieces_B = self._windows(examples)
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


class _Mixture:
    """Several sources of one kind; what they share is said by the first, the config's own."""

    def __init__(self, parts: dict[str, _Source], batch_size: int):
        self._names, self._parts = list(parts), list(parts.values())
        first = self._parts[0]
        self.carries, self.batch_size = first.carries, batch_size
        self.shapes = ((batch_size, first.seq_len),)

    def batch(self, step, rows):
        rows = range(self.batch_size)[rows]
        places, batches = zip(*self._by_part(step, rows), strict=True)
        back = np.argsort(np.concatenate(places))
        joined = {}
        for field in dataclasses.fields(Batch):
            arrays = [getattr(batch, field.name) for batch in batches]
            joined[field.name] = None if arrays[0] is None else np.concatenate(arrays)[back]
        return Batch(**{**joined, "rows_B": np.asarray(rows, np.int32)})

    def counts(self, num_steps):
        tokens = self._tokens(num_steps)
        return {f"tokens_from/{name}": int(found) for name, found in zip(self._names, tokens, strict=True)}


class MixedStreams(_Mixture):
    """A mixture of streams: each row reads one of them for ever, so that its carry goes on; shares are rounded to whole rows.

    A stream that ends begins anew, and its rows alone are emptied then.
    """

    def __init__(self, corpora: dict[str, Corpus], weights: Sequence[float], batch_size: int, seq_len: int, seed: int):
        counts = whole_shares(weights, batch_size)
        for name, count in zip(corpora, counts, strict=True):
            if not count:
                raise UserError(
                    f"config.data.mixture_weights {tuple(weights)} leave {name} none of the {batch_size} rows, each of which "
                    "reads one stream; make config.data.batch_size or its share larger, or set config.data.order='windows'"
                )
        super().__init__(
            {name: Stream(found, count, seq_len, seed) for (name, found), count in zip(corpora.items(), counts, strict=True)},
            batch_size,
        )
        self._ends = np.cumsum(counts).tolist()
        self.tokens_per_step: int | Fraction = batch_size * seq_len
        self.steps_per_epoch: int | Fraction = self._parts[0].steps_per_epoch

    def epoch(self, step):
        return self._parts[0].epoch(step)

    def _tokens(self, num_steps):
        return [num_steps * part.tokens_per_step for part in self._parts]

    def _by_part(self, step, rows):
        """The places in `rows` that a part fills, and what it fills them with."""
        for part, end in zip(self._parts, self._ends, strict=True):
            first = end - part.batch_size
            places = [place for place, row in enumerate(rows) if first <= row < end]
            if places:
                yield places, part.rows(step, [rows[place] - first for place in places])


class MixedWindows(_Mixture):
    """A mixture of shuffled windows (packed or padded ones too): of every 1,000 examples each part has its share, shuffled.

    Which part example i is of, and which of that part's own, is a function of the seed and i alone, so any step is reached at
    once; each part comes round in epochs of its own, every window once in each.
    """

    _BLOCK = 1000

    def __init__(self, kind: type[Windows], corpora, weights: Sequence[float], batch_size: int, seq_len: int, seed: int):
        self._counts = whole_shares(weights, self._BLOCK)
        for name, count in zip(corpora, self._counts, strict=True):
            if not count:
                raise UserError(f"config.data.mixture_weights {tuple(weights)} give {name} less than a share of 0.001")
        super().__init__({name: kind(found, batch_size, seq_len, seed) for name, found in corpora.items()}, batch_size)
        self._ends = np.cumsum(self._counts)
        self._seed, self._parts_of_block = seed, functools.lru_cache(4)(self._block_parts)
        shares = [Fraction(count, self._BLOCK) for count in self._counts]
        self.tokens_per_step = sum(share * part.tokens_per_step for share, part in zip(shares, self._parts, strict=True))
        self.steps_per_epoch = self._parts[0].steps_per_epoch / shares[0]

    def epoch(self, step):
        return self._before(step * self.batch_size)[0] // self._parts[0].num_windows

    def _tokens(self, num_steps):
        examples = self._before(num_steps * self.batch_size)
        return [number * part.tokens_per_step / self.batch_size for number, part in zip(examples, self._parts, strict=True)]

    def _block_parts(self, block):
        """The part that each example of a block is of, and how many of that part stand before it there."""
        places = [shuffled(index, self._BLOCK, (self._seed, block, _OF_MIXTURE)) for index in range(self._BLOCK)]
        parts = np.searchsorted(self._ends, places, side="right")
        before = np.zeros(self._BLOCK, np.int64)
        for part in range(len(self._parts)):
            before[parts == part] = np.arange(self._counts[part])
        return parts, before

    def _own(self, example):
        """The part that an example is of, and its number among that part's."""
        block, index = divmod(example, self._BLOCK)
        parts, before = self._parts_of_block(block)
        part = int(parts[index])
        return part, block * self._counts[part] + int(before[index])

    def _before(self, example):
        """How many examples of each part come before one."""
        block, index = divmod(example, self._BLOCK)
        here = np.bincount(self._parts_of_block(block)[0][:index], minlength=len(self._parts))
        return [block * count + int(some) for count, some in zip(self._counts, here, strict=True)]

    def _by_part(self, step, rows):
        """The places in `rows` that a part fills, and what it fills them with."""
        own = [self._own(step * self.batch_size + row) for row in rows]
        for number, part in enumerate(self._parts):
            places = [place for place, (of, _) in enumerate(own) if of == number]
            if places:
                yield places, part.examples([own[place][1] for place in places], places)


def whole_shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to a total and are nearest to shares of it (largest remainders)."""
    exact = np.asarray(weights) / np.sum(weights) * total
    counts = np.floor(exact + 1e-9).astype(int)
    for part in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[part] += 1
    return counts.tolist()


def random_lengths(total: int, mean: int, std: float, seeds: tuple[int, ...]) -> np.ndarray:
    """Lengths that add up to a total: each about normal around the mean or, one time in twenty, around half of it.

    None is shorter than five tokens (unless the total is); what the last ones leave over goes to the one before.
    """
    random, lengths, left = np.random.default_rng(seeds), [], total
    while left:
        centre = mean / 2 if random.random() < _HALVED else mean
        length = min(max(_SHORTEST, int(random.normal(centre, std))), left)
        if left - length < _SHORTEST:
            length = left
        lengths.append(length)
        left -= length
    return np.array(lengths, np.int64)


def shuffled(index: int, length: int, seeds: tuple[int, ...]) -> int:
    """Where a permutation of `length` things, one of its own for each tuple of seeds, puts the thing of an index."""
    from grain.experimental import index_shuffle

    return index_shuffle(index, max_index=length - 1, seed=_mixed(seeds), rounds=4) if length > 1 else 0


@functools.lru_cache(64)
def _mixed(seeds):
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])


def batches(config: Config, corpus: Corpus, mixture: Mapping[str, Corpus] | None = None) -> BatchSource:
    """The configured source of training batches.

    Args:
      corpus: the config's own train split.
      mixture: what `config.data.mixture` adds to it, by name.
    """
    data = config.data
    kind = {"stream": Stream, "windows": Windows, "packed": Packed, "padded": Padded}[data.order]
    shape = data.batch_size, data.seq_len, config.seed
    if data.seq_len_std is not None:
        return StreamOfRandomLengths(corpus, *shape, data.seq_len_std)
    if not mixture:
        return kind(corpus, *shape)
    corpora = {data.source: corpus, **mixture}
    if kind is Stream:
        return MixedStreams(corpora, data.mixture_weights, *shape)
    return MixedWindows(kind, corpora, data.mixture_weights, *shape)
