"""What the scores of single tokens tell: the uncertainty of a difference, and the loss by position in the context."""

import typing

import numpy as np

from lm.errors import UserError

# Neighbouring tokens share sentence, paragraph and topic, so blocks must be long beside that dependence: 256 words are some ten
# sentences, whatever the tokens. But the spread is estimated from the blocks, so there must be many: a short text is cut into at
# least 50.
BLOCK_WORDS = 256
MIN_BLOCKS = 50
NUM_RESAMPLES = 10_000
_ENTRIES_AT_ONCE = 4_000_000  # bounds the memory of the resampling to some hundred MB for any length of text


class Interval(typing.NamedTuple):
    """An estimate with its 95% interval, in the unit of what was estimated."""

    estimate: float
    low: float
    high: float


class PositionLoss(typing.NamedTuple):
    """Mean nll per bin of positions, with a 95% interval; P bins that hold positions first..last, counted from 1."""

    first_P: np.ndarray  # int
    last_P: np.ndarray  # int
    loss_P: np.ndarray  # nats per token
    low_P: np.ndarray
    high_P: np.ndarray


def default_block_length(num_tokens: int, num_words: int | None = None) -> int:
    """Tokens of a block for a text of so many tokens and words (None: each token is one): those of BLOCK_WORDS, or less where
    that would leave fewer than MIN_BLOCKS."""
    tokens_per_word = num_tokens / num_words if num_words else 1.0
    return max(1, min(round(BLOCK_WORDS * tokens_per_word), num_tokens // MIN_BLOCKS))


def paired_block_bootstrap(
    first_nll_N: np.ndarray,
    second_nll_N: np.ndarray,
    *,
    block_length: int | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Difference in mean nll of two models on the same tokens, with its 95% interval.

    The differences per token are resampled in circular blocks (Künsch 1989, "The jackknife and the bootstrap for general
    stationary observations"; Politis and Romano 1992, "A circular block-resampling procedure for stationary data"): blocks begin
    anywhere with equal chance and wrap around the end, so every token weighs the same; the last block is cut so that a resample
    has exactly N tokens. The interval is that of the percentiles. It covers the choice of text, not that of the seed.

    Args:
      first_nll_N: nll of every token under the first model, in corpus order, nats.
      second_nll_N: the same under the second model; the same tokens, so the same tokenizer.
      block_length: tokens of a block; by default `default_block_length(N)`, for tokens that are words; 1 would treat tokens as
        independent.
      num_resamples: resamples drawn.
      seed: of the resampling.

    Returns:
      mean(first) - mean(second) in nats per token; above 0 where the first model is worse.

    Raises:
      UserError: the two do not score the same number of tokens, there are none, or a score is not finite.
    """
    if first_nll_N.shape != second_nll_N.shape or first_nll_N.ndim != 1 or not first_nll_N.size:
        raise UserError(f"a paired difference needs the same N tokens twice, not {first_nll_N.shape} and {second_nll_N.shape}")
    difference_N = first_nll_N.astype(np.float64) - second_nll_N.astype(np.float64)
    if not np.isfinite(difference_N).all():
        raise UserError("a paired difference needs finite scores, but some nll is infinite or not a number")
    num_tokens = difference_N.size
    length = default_block_length(num_tokens) if block_length is None else min(block_length, num_tokens)
    num_blocks = -(-num_tokens // length)
    lengths = np.full(num_blocks, length)
    lengths[-1] = num_tokens - (num_blocks - 1) * length
    # the sum of any block is the difference of two cumulative sums, so resampling costs per block, not per token
    cumulative = np.concatenate([[0.0], np.cumsum(np.concatenate([difference_N, difference_N[:length]]))])
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    chunk = max(1, _ENTRIES_AT_ONCE // num_blocks)
    for begin in range(0, num_resamples, chunk):
        part = means[begin : begin + chunk]
        starts = generator.integers(0, num_tokens, size=(part.size, num_blocks))
        part[:] = (cumulative[starts + lengths] - cumulative[starts]).sum(axis=1) / num_tokens
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(difference_N.mean()), float(low), float(high))


def loss_by_position(nll_N: np.ndarray, context: int) -> PositionLoss:
    """Mean nll against the position in windows that follow one another without overlap.

    Token i stands at position i % context + 1. The bins double: 1, 2, 3-4, 5-8, and so on. The interval takes windows as
    independent: the spread of each window's sum about its expectation (the ratio estimator, as the last window may be short).

    Args:
      nll_N: nll of every token in corpus order, from an evaluation whose context and stride are both `context`, nats.
      context: tokens of a window.

    Returns:
      The bins that hold any token, in order of position; the interval is nan where there is a single window.
    """
    num_windows = -(-nll_N.size // context)
    nll_WT = np.zeros((num_windows, context))
    nll_WT.reshape(-1)[: nll_N.size] = nll_N
    present_WT = np.arange(num_windows * context).reshape(num_windows, context) < nll_N.size
    longest = min(context, nll_N.size)
    begins_P = np.array([0, *(2**power for power in range(longest.bit_length()) if 2**power < longest)])
    ends_P = np.append(begins_P[1:], longest)
    sums_WP = np.add.reduceat(nll_WT[:, :longest], begins_P, axis=1)
    counts_WP = np.add.reduceat(present_WT[:, :longest].astype(np.int64), begins_P, axis=1)
    counts_P = counts_WP.sum(axis=0)
    loss_P = sums_WP.sum(axis=0) / counts_P
    if num_windows == 1:
        margin_P = np.full_like(loss_P, np.nan)
    else:
        spread_P = np.square(sums_WP - loss_P * counts_WP).sum(axis=0) * num_windows / (num_windows - 1)
        margin_P = 1.96 * np.sqrt(spread_P) / counts_P
    return PositionLoss(begins_P + 1, ends_P, loss_P, loss_P - margin_P, loss_P + margin_P)
