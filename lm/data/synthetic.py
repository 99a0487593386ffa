"""Synthetic text whose entropy is known: seeded processes, each character with its true conditional nats.

The best that any model can do on such a text is to know the process: the mean of the true nats is a floor under its loss.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import string
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from lm.config import DataConfig

_CHUNK = 1 << 14  # characters of a text without lines that are made at a time
_CONCENTRATION = 0.5  # of the Dirichlet distribution that rows of probabilities are drawn from; below 1 they are uneven
# The bounds of a hidden Markov model's entropy rate are closed up to this gap in nats, or until a table grows so large.
_GAP, _MOST_ENTRIES = 1e-7, 1 << 22

Piece = tuple[str, np.ndarray]  # some characters of a text, and the nats of each given all before it


@dataclasses.dataclass(frozen=True)
class EntropyRate:
    """Nats per character in the long run; the true value is at most `error` away."""

    nats: float
    error: float = 0.0


class Process(Protocol):
    """A source of text with a known law."""

    def pieces(self, rng: np.random.Generator) -> Iterator[Piece]:
        """Text without end, in lines or chunks, with the true -log p of each character given all before it."""

    def entropy_rate(self) -> EntropyRate:
        """The mean of those nats in the long run."""


def process(data: DataConfig) -> Process:
    """The process that `data.process` names, its parameters drawn from `data.synthetic_seed`."""
    rng = _rng(data.synthetic_seed, 0)
    if data.process == "markov":
        return MarkovChain(_rows(rng, (data.alphabet_size,) * data.markov_order, data.alphabet_size))
    if data.process == "hidden_markov":
        transition_SS = _rows(rng, (data.num_states,), data.num_states)
        return HiddenMarkov(transition_SS, _rows(rng, (data.num_states,), data.alphabet_size))
    if data.process == "copy":
        return Copy(data.alphabet_size, data.copy_length)
    return Dyck(data.max_depth)


def text(data: DataConfig, split: str) -> Iterator[Piece]:
    """The first `data.num_characters` characters of train, or a tenth of that of valid or test, each from a seed of its own."""
    remaining = data.num_characters if split == "train" else max(1, data.num_characters // 10)
    rng = _rng(data.synthetic_seed, 1 + ("train", "valid", "test").index(split))
    for characters, nats in process(data).pieces(rng):
        yield characters[:remaining], nats[:remaining]
        remaining -= len(characters)
        if remaining <= 0:
            return


def _rng(seed, purpose):
    return np.random.default_rng(np.random.SeedSequence([seed, purpose]))


def _rows(rng, shape, size):
    return rng.dirichlet([_CONCENTRATION] * size, shape)


def _entropy(probs: np.ndarray) -> np.ndarray:
    """-sum p log p over the last axis."""
    return -np.sum(np.where(probs > 0, probs * np.log(np.where(probs > 0, probs, 1)), 0), axis=-1)


def _cumulative(probs_RA: np.ndarray) -> list[list[float]]:
    """Inner bounds for drawing with `bisect`: entry i is the probability of the symbols up to i, the last one left out."""
    return np.cumsum(probs_RA, axis=-1)[:, :-1].tolist()


@dataclasses.dataclass(frozen=True)
class MarkovChain:
    """Each letter is drawn given the k letters before it; the first ones as if `a` had stood there for ever.

    Attributes:
      probs: float64 [A, ..., A, A], k + 1 axes: of the next letter (last axis) after k letters, the oldest first.
    """

    probs: np.ndarray

    def pieces(self, rng):
        size = self.probs.shape[-1]
        table_RA = self.probs.reshape(-1, size)
        cumulative, nats_RA, num_states, state = _cumulative(table_RA), -np.log(table_RA), len(table_RA), 0
        while True:
            states, symbols = [], []
            for draw in rng.random(_CHUNK).tolist():
                symbol = bisect.bisect_right(cumulative[state], draw)
                states.append(state)
                symbols.append(symbol)
                state = (state * size + symbol) % num_states
            yield _letters(symbols), nats_RA[states, symbols]

    def entropy_rate(self):
        """sum over contexts of their stationary probability times the entropy of the next letter; exact to rounding."""
        stationary = np.full(self.probs.shape[:-1], 1 / self.probs[..., 0].size)
        for _ in range(100_000):
            after = (stationary[..., None] * self.probs).sum(axis=0)
            moved, stationary = np.abs(after - stationary).max(), after
            if moved < 1e-15:
                break
        return EntropyRate(float((stationary * _entropy(self.probs)).sum()))


@dataclasses.dataclass(frozen=True)
class HiddenMarkov:
    """A chain of hidden states, begun in its stationary distribution; each state emits a letter.

    Attributes:
      transition_SS: float64, from row to column.
      emission_SA: float64, of the letters in each state.
    """

    transition_SS: np.ndarray
    emission_SA: np.ndarray

    def pieces(self, rng):
        states, letters = _cumulative(self.transition_SS), _cumulative(self.emission_SA)
        forward_ASS = self.emission_SA.T[:, :, None] * self.transition_SS  # the forward algorithm: emit, then move
        belief_S = self.stationary_S
        state = int(rng.choice(len(belief_S), p=belief_S))
        while True:
            symbols, probs = [], np.empty(_CHUNK)
            for i, (draw_letter, draw_state) in enumerate(rng.random((_CHUNK, 2)).tolist()):
                symbol = bisect.bisect_right(letters[state], draw_letter)
                symbols.append(symbol)
                joint_S = belief_S @ forward_ASS[symbol]
                probs[i] = prob = joint_S.sum()
                belief_S = joint_S / prob
                state = bisect.bisect_right(states[state], draw_state)
            yield _letters(symbols), -np.log(probs)

    @functools.cached_property
    def stationary_S(self) -> np.ndarray:
        """The distribution of states in the long run."""
        size = len(self.transition_SS)
        equations = np.vstack([self.transition_SS.T - np.eye(size), np.ones(size)])
        return np.linalg.lstsq(equations, np.append(np.zeros(size), 1.0), rcond=None)[0]

    def entropy_rate(self):
        """Half-way between two bounds that close in on it, H(X_n | X_1 … X_n-1, S_1) and H(X_n | X_1 … X_n-1).

        All texts of n letters are gone through, n as long as memory allows. Cover & Thomas 2006, Elements of Information
        Theory, theorem 4.5.1.
        """
        num_states, size = self.emission_SA.shape
        # joint_BXS: of the first state b, the letters x so far and the state that emits the next one
        joint_BXS = np.diag(self.stationary_S)[:, None, :]
        before, low, high = np.zeros(2), 0.0, math.inf
        while high - low > _GAP and joint_BXS.size * size <= _MOST_ENTRIES:
            joint_BXAS = joint_BXS[:, :, None, :] * self.emission_SA.T
            joint_BXS = (joint_BXAS @ self.transition_SS).reshape(num_states, -1, num_states)
            known_BX = joint_BXS.sum(axis=-1)
            # block entropies: of the letters with the first state, and of the letters alone
            blocks = np.array([_entropy(known_BX.ravel()) - _entropy(self.stationary_S), _entropy(known_BX.sum(axis=0))])
            low, high = max(low, float(blocks[0] - before[0])), min(high, float(blocks[1] - before[1]))
            before = blocks
        return EntropyRate((low + high) / 2, abs(high - low) / 2)


@dataclasses.dataclass(frozen=True)
class Copy:
    """Lines `abca=abca`: letters drawn evenly, which cost log A each, and their copy, which costs nothing."""

    alphabet_size: int
    length: int

    def pieces(self, rng):
        nats = np.zeros(2 * self.length + 2)
        nats[: self.length] = math.log(self.alphabet_size)
        while True:
            word = _letters(rng.integers(self.alphabet_size, size=self.length))
            yield f"{word}={word}\n", nats

    def entropy_rate(self):
        """Exact."""
        return EntropyRate(self.length * math.log(self.alphabet_size) / (2 * self.length + 2))


@dataclasses.dataclass(frozen=True)
class Dyck:
    """Lines of well-nested brackets of two kinds, `([])()`: Dyck-2 with a deepest level.

    Before each character a fair coin says whether a bracket opens, of either kind alike. If not, the last open one closes,
    or the line ends where none is open. At the deepest level a bracket always closes. So a character costs log 4 if it
    opens, log 2 if it closes or ends the line, and nothing at the deepest level.
    """

    max_depth: int

    def pieces(self, rng):
        opens, closes = "([", ")]"
        draws = itertools.chain.from_iterable(rng.integers(4, size=_CHUNK).tolist() for _ in itertools.count())
        while True:
            line, nats, stack = [], [], []
            while not line or line[-1] != "\n":
                if len(stack) == self.max_depth:
                    line.append(closes[stack.pop()])
                    nats.append(0.0)
                    continue
                draw = next(draws)
                if draw < 2:
                    stack.append(draw)
                    line.append(opens[draw])
                    nats.append(math.log(4))
                else:
                    line.append(closes[stack.pop()] if stack else "\n")
                    nats.append(math.log(2))
            yield "".join(line), np.array(nats)

    def entropy_rate(self):
        """The depth before a character is a birth-death chain: even at all levels but the deepest, which has half of that.

        Below the deepest level a character has log 2 for the coin and, half of the time, log 2 for the kind.
        """
        return EntropyRate(self.max_depth * 1.5 * math.log(2) / (self.max_depth + 0.5))


def _letters(symbols) -> str:
    return "".join(string.ascii_lowercase[symbol] for symbol in symbols)
