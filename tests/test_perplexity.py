"""lm.evaluation.perplexity and scorers: every token once whatever the batching, and figures that can be checked by hand."""

import math

import jax
import numpy as np
import pytest
from helpers import corpus_of, model_and_params
from hypothesis import example, given, settings, strategies as st

from lm.evaluation.perplexity import Layout, _batches, figures, token_losses
from lm.evaluation.scorers import NgramScorer, neural_scorer, score_ahead
from lm.models.ngram import Ngram
from lm.parallel import Placement

EOS = 5000


class Recorder:
    """Says of every target how many tokens of left context its row has seen, and checks what it is given.

    For a corpus whose tokens are their own places. Its memory is the last target of each row, and how many there were.
    """

    def start(self, num_rows):
        return np.full(num_rows, -2), np.zeros(num_rows, int)

    def score(self, memory, batch):
        targets_BT = batch.targets_BT
        last_B, seen_B = self.start(len(targets_BT)) if memory is None else memory
        last_B, seen_B = np.where(batch.reset_B, -2, last_B), np.where(batch.reset_B, 0, seen_B)
        there_BT = batch.loss_weights_BT > 0
        expected_BT = np.where(targets_BT == 0, EOS, targets_BT - 1)
        assert np.all((batch.inputs_BT == expected_BT)[there_BT])
        assert np.all(np.diff(there_BT.astype(int), axis=1) <= 0)  # padding stands at the right
        goes_on = there_BT[:, 0] & (seen_B > 0)
        assert np.all((last_B + 1 == targets_BT[:, 0])[goes_on])
        context_BT = seen_B[:, None] + np.arange(targets_BT.shape[1])
        after = np.where(there_BT.any(axis=1), targets_BT.max(axis=1), last_B), seen_B + there_BT.sum(axis=1)
        return context_BT.astype(np.float32), None if memory is None else after

    def fetch(self, nll_BT):
        return nll_BT


def test_empty_rows_beside_the_streams_change_nothing():
    """Five streams on four devices are scored as five streams, not as eight, which would have other seams."""
    corpus = corpus_of(np.arange(3000), 5001, eos=EOS)
    plain = token_losses(Recorder(), corpus, Layout(rows=5))
    np.testing.assert_array_equal(token_losses(Recorder(), corpus, Layout(rows=5, row_multiple=4)), plain)
    assert Layout(rows=5, row_multiple=4).filled_rows == 8
    windows = token_losses(Recorder(), corpus, Layout(context=10, stride=5, rows=3))
    np.testing.assert_array_equal(token_losses(Recorder(), corpus, Layout(context=10, stride=5, rows=3, row_multiple=2)), windows)
    whole = token_losses(Recorder(), corpus, Layout(context=100_000, stride=1000, rows=2))
    np.testing.assert_array_equal(whole, np.arange(3000))


class Bigram:
    """Probabilities of a token after another, from a table."""

    precision = "float64"

    def __init__(self, table):
        self.table = table

    def start(self, num_rows):
        return num_rows

    def score(self, memory, batch):
        pairs = np.stack([batch.inputs_BT, batch.targets_BT], axis=-1)
        return -np.log([[self.table.get(tuple(map(int, pair)), 1.0) for pair in row] for row in pairs]), memory

    def fetch(self, nll_BT):
        return nll_BT


def counted(num_tokens, layout):
    """What the recorder says of every token, and the numbers that `progress` was told."""
    told = []
    nll_N = token_losses(Recorder(), corpus_of(np.arange(num_tokens), 5001, eos=EOS), layout, told.append)
    return nll_N, told


@settings(deadline=None, max_examples=150)
@given(
    num_tokens=st.integers(1, 300),
    context=st.integers(1, 40),
    stride_share=st.floats(0, 1),
    rows=st.integers(1, 9),
)
@example(num_tokens=1, context=40, stride_share=0.5, rows=9)
@example(num_tokens=40, context=40, stride_share=1.0, rows=1)
@example(num_tokens=41, context=40, stride_share=1.0, rows=1)
@example(num_tokens=41, context=40, stride_share=0.0, rows=3)
def test_windows_score_every_token_once_with_enough_context(num_tokens, context, stride_share, rows):
    stride = max(1, round(stride_share * context))
    context_N, told = counted(num_tokens, Layout(context, stride, rows))
    assert sum(told) == num_tokens
    np.testing.assert_array_equal(context_N[:context], np.arange(min(context, num_tokens)))  # the first window
    assert np.all(context_N[context:] >= context - stride) and np.all(context_N < context)
    if num_tokens > context:
        assert context_N[context] == context - stride  # and not more often than need be


@settings(deadline=None, max_examples=80)
@given(num_tokens=st.integers(1, 1500), rows=st.integers(1, 9), segment=st.integers(1, 300))
@example(num_tokens=256, rows=1, segment=256)
@example(num_tokens=257, rows=1, segment=256)
@example(num_tokens=3, rows=9, segment=256)
def test_a_carried_stream_scores_every_token_once(num_tokens, rows, segment):
    context_N, told = counted(num_tokens, Layout(None, None, rows, segment=segment))
    assert sum(told) == num_tokens
    length = math.ceil(num_tokens / rows)
    np.testing.assert_array_equal(context_N, np.arange(num_tokens) % length)  # with one row: all that stands before


def test_the_worked_example_of_the_protocol():
    probabilities = [0.4, 0.3, 0.5, 0.2, 0.1]
    assert f"{figures(-np.log(probabilities), 1, 1)['perplexity']:.4f}" == "3.8385"

    table = {(EOS, 0): 0.4, (0, 1): 0.3, (1, 2): 0.5, (2, 3): 0.2, (3, 4): 0.1}
    corpus = corpus_of(np.arange(5), 5001, eos=EOS)
    for layout in (Layout(), Layout(None, None, 2), Layout(2, 1, 3), Layout(5, 5, 1)):
        nll_N = token_losses(Bigram(table), corpus, layout)
        assert figures(nll_N, 1, 1)["perplexity"] == pytest.approx(3.8385, abs=5e-5)


def test_the_figures_by_hand():
    found = figures(np.log([2.0, 4.0, 8.0, 4.0]), num_bytes=16, num_words=2)  # 8 bits in all
    assert found["nll_sum"] == pytest.approx(8 * math.log(2))
    assert found["loss"] == pytest.approx(2 * math.log(2))
    assert found["perplexity"] == pytest.approx(4.0)
    assert found["bits_per_byte"] == pytest.approx(0.5)
    assert found["word_perplexity"] == pytest.approx(16.0)  # 4 bits a word
    assert figures(np.ones(3), 3, 0)["word_perplexity"] is None
    assert figures(np.full(3, 800.0), 3, 1)["perplexity"] == math.exp(700)


def test_sums_are_taken_in_float64():
    nll_N = np.full(3_000_000, 0.1, np.float32)
    nll_N[0] = 1e6  # a running sum in float32 would lose a digit with every token
    exact = math.fsum(map(float, nll_N))
    assert figures(nll_N, 1, 1)["nll_sum"] == pytest.approx(exact, rel=1e-12)


VOCAB = 11
TOKENS = np.random.default_rng(3).integers(0, VOCAB, 83)
WINDOWED = dict(model__attention_window=6, data__order="stream")


def neural(architecture, **fields):
    model, params = model_and_params(architecture, VOCAB, scale=6.0, **fields)
    placement = Placement(1)
    return model, params, neural_scorer(model, placement)(placement.put_state(params))


def direct(model, params, before_B, targets_BT):
    """Nats of every token of some texts, each after one token, by one application; the softmax by NumPy in float64."""

    @jax.jit
    def logits(params, inputs_BT):
        hidden_BTD = model.apply({"params": params}, inputs_BT).hidden_BTD
        return model.apply({"params": params}, hidden_BTD, method="logits")

    inputs_BT = np.concatenate([before_B[:, None], targets_BT[:, :-1]], axis=1)
    logits_BTV = np.asarray(logits(params, inputs_BT), np.float64)
    target_BT = np.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return np.log(np.exp(logits_BTV).sum(axis=-1)) - target_BT


@pytest.mark.parametrize("architecture, fields", [("lstm", {}), ("transformer", WINDOWED)])
def test_carried_is_the_whole_text_at_once_in_segments_of_any_length(architecture, fields):
    model, params, scorer = neural(architecture, **fields)
    expected_N = direct(model, params, np.zeros(1, int), TOKENS[None])[0]
    assert expected_N.std() > 0.3  # the model has opinions
    for segment in (7, 256):
        nll_N = token_losses(scorer, corpus_of(TOKENS, VOCAB), Layout(segment=segment))
        assert nll_N.dtype == np.float32
        np.testing.assert_allclose(nll_N, expected_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["lstm", "transformer"])
def test_windows_are_texts_of_their_own_whatever_the_rows(architecture):
    model, params, scorer = neural(architecture, **(dict(model__positions="learned") if architecture == "transformer" else {}))
    context, stride = 12, 5
    starts = [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75]  # the last window ends past the text
    padded = np.concatenate([[0], TOKENS, np.zeros(4, int)])
    targets_BT = np.stack([padded[start + 1 : start + 1 + context] for start in starts])
    nll_BT = direct(model, params, padded[starts], targets_BT)
    expected_N = np.concatenate([nll_BT[0], nll_BT[1:, context - stride :].ravel()])[: len(TOKENS)]
    for rows in (1, 7):
        nll_N = token_losses(scorer, corpus_of(TOKENS, VOCAB), Layout(context, stride, rows))
        np.testing.assert_allclose(nll_N, expected_N, rtol=1e-5, atol=1e-5)


def test_windows_are_numbered_whatever_the_rows():
    """Dropout masks are of a window's number, so that a mean over samples does not depend on how many are scored at once."""
    seen = {}
    for rows in (1, 3):
        windows = [batch for batch, _ in _batches(corpus_of(TOKENS, VOCAB), Layout(12, 5, rows))]
        seen[rows] = np.concatenate([batch.rows_B[batch.loss_weights_BT.any(axis=1)] for batch in windows])
    np.testing.assert_array_equal(seen[1], np.arange(16))
    np.testing.assert_array_equal(seen[3], np.arange(16))


def test_more_rows_of_a_carried_stream_start_anew_at_their_seams():
    _, _, scorer = neural("lstm")
    corpus = corpus_of(TOKENS, VOCAB)
    one, three = (token_losses(scorer, corpus, Layout(None, None, rows)) for rows in (1, 3))
    length = math.ceil(len(TOKENS) / 3)
    np.testing.assert_allclose(three[:length], one[:length], rtol=1e-5, atol=1e-5)
    seam = slice(length, length + 3)
    assert np.abs(three[seam] - one[seam]).max() > 1e-3


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_an_ngram_in_segments_is_one_long_look_up(order):
    model = Ngram(order, VOCAB)
    tables = model.prepare(model.count(TOKENS, 0))
    text = np.concatenate([np.full(order, -1), [0], TOKENS])  # unknown, the eos context, then the text
    history_NH = np.stack([text[i + order + 1 - (order - 1) : i + order + 1] for i in range(len(TOKENS))])
    expected_N = -model.log_probs(tables, history_NH.reshape(len(TOKENS), order - 1), TOKENS)
    scorer = NgramScorer(model, tables)
    for segment in (1, 4, 256):
        nll_N = token_losses(scorer, corpus_of(TOKENS, VOCAB), Layout(segment=segment))
        np.testing.assert_allclose(nll_N, expected_N, rtol=1e-6)
    wide = token_losses(scorer, corpus_of(TOKENS, VOCAB), Layout(20, 20 - order + 1, 3))
    np.testing.assert_allclose(wide, expected_N, rtol=1e-6)  # enough context for this order
    np.testing.assert_allclose(token_losses(scorer, corpus_of(TOKENS, VOCAB), Layout(len(TOKENS), 1, 1)), expected_N, rtol=1e-6)


def test_a_scorer_told_nothing_remembers_nothing():
    for scorer in (neural("lstm")[2], NgramScorer(model := Ngram(3, VOCAB), model.prepare(model.count(TOKENS, 0)))):
        nll_N = token_losses(scorer, corpus_of(TOKENS, VOCAB), Layout(1, 1, 4))
        pairs = {}
        for before, token, nll in zip([0, *TOKENS[:-1]], TOKENS, nll_N, strict=True):
            pairs.setdefault((before, token), []).append(nll)
        assert max(np.ptp(values) for values in pairs.values()) < 1e-5  # a function of the token before alone
        assert max(map(len, pairs.values())) > 1


def test_segments_are_sent_before_the_result_of_one_is_waited_for():
    told = []

    class Recorder:
        def score(self, memory, batch):
            told.append(f"send {batch}")
            return (batch, memory), memory + 1

        def fetch(self, nll_BT):
            told.append(f"fetch {nll_BT[0]}")
            return nll_BT

    results = list(score_ahead(Recorder(), 10, [(number, f"note {number}") for number in range(4)]))
    assert results == [((number, 10 + number), f"note {number}") for number in range(4)]
    assert told == ["send 0", "send 1", "send 2", "fetch 0", "send 3", "fetch 1", "fetch 2", "fetch 3"]
