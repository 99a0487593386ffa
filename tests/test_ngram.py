"""The n-gram model against the paper's equations written with dictionaries, numbers worked out by hand, and its invariants."""

import collections
import functools
import math

import numpy as np
import pytest

from lm.errors import UserError
from lm.models.ngram import Ngram, modified_discounts

BEGINNING = "beginning of the text"


class Reference:
    """Chen and Goodman's equations over dictionaries of tuples, one probability at a time."""

    def __init__(self, order, vocab_size, tokens, eos):
        self.vocabulary = range(vocab_size)
        text = [BEGINNING, eos, *tokens]
        self.counts = {}
        for k in range(1, order + 1):
            counts, left = collections.Counter(), collections.defaultdict(set)
            for end in range(2, len(text)):  # the targets: everything after the leading eos
                start = end - k + 1
                if start >= 1:
                    ngram = tuple(text[start : end + 1])
                    counts[ngram] += 1
                    left[ngram].add(text[start - 1])
            self.counts[k] = counts if k == order else {ngram: len(found) for ngram, found in left.items()}
        self.discounts = {k: self.discounts_of(list(counts.values())) for k, counts in self.counts.items()}
        self.probability = functools.cache(self.probability)

    @staticmethod
    def discounts_of(values):
        n1, n2, n3, n4 = (values.count(j) for j in (1, 2, 3, 4))
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
            if min(found) > 0:
                return found
        return 0.5, 1.0, 1.5

    def probability(self, token, history):
        """p(token | history) for a tuple of known tokens, by the recursion of the paper."""
        shorter = self.probability(token, history[1:]) if history else 1 / len(self.vocabulary)
        k = len(history) + 1
        following = [self.counts[k].get((*history, other), 0) for other in self.vocabulary]
        total = sum(following)
        if total == 0:
            return shorter
        d1, d2, d3 = self.discounts[k]
        gamma = (d1 * following.count(1) + d2 * following.count(2) + d3 * sum(c >= 3 for c in following)) / total
        count = following[token]
        return (count - (0, d1, d2, d3)[min(count, 3)]) / total + gamma * shorter


def known(history):
    """The part of a history that an n-gram may use: what stands right of the last -1."""
    history = [int(token) for token in history]
    return tuple(history[max((i + 1 for i, token in enumerate(history) if token < 0), default=0) :])


def zipf_text(rng, vocab_size, length):
    """Skewed, repetitive tokens, which never use the upper fifth of the vocabulary."""
    used = max(1, vocab_size * 4 // 5)
    probs = 1 / np.arange(1, used + 1)
    tokens = rng.choice(used, size=length, p=probs / probs.sum())
    for _ in range(length // 10):
        source, target = rng.integers(0, length - 6, size=2)
        tokens[target : target + 6] = tokens[source : source + 6]
    return tokens


def histories(rng, vocab_size, order, tokens, eos, number):
    """Histories [number, order - 1]: passages of the text, its beginning, random tokens, and either with a -1 somewhere."""
    width = order - 1
    text = np.concatenate([np.full(width, -1), [eos], tokens])
    starts = rng.integers(0, len(text) - width + 1, size=number)
    found = np.stack([text[start : start + width] for start in starts])
    found[0] = text[1 : width + 1]  # the first target's: [-1, ..., -1, eos]
    found[number // 2 :] = rng.integers(0, vocab_size, size=(number - number // 2, width))
    if width:
        for i in range(2, number, 3):
            found[i, rng.integers(0, width)] = -1
    return found.astype(np.int32)


def all_probs(model, tables, history):
    """[V] probabilities of every token after one history."""
    history_VH = np.tile(np.asarray(history, np.int32).reshape(1, -1), (model.vocab_size, 1))
    return np.exp(model.log_probs(tables, history_VH, np.arange(model.vocab_size)))


def fit(order, vocab_size, tokens, eos=0):
    model = Ngram(order, vocab_size)
    params = model.count(np.asarray(tokens), eos)
    return model, params, model.prepare(params)


CASES = [
    (order, vocab_size, length, seed)
    for seed, (vocab_size, length) in enumerate([(1, 12), (2, 40), (5, 60), (12, 300), (40, 800)])
    for order in (1, 2, 3, 4, 5)
]


@pytest.mark.parametrize("order, vocab_size, length, seed", CASES)
def test_probabilities_equal_the_papers_equations_and_sum_to_one(order, vocab_size, length, seed):
    rng = np.random.default_rng(100 * seed + order)
    tokens, eos = zipf_text(rng, vocab_size, length), int(rng.integers(vocab_size))
    model, _, tables = fit(order, vocab_size, tokens, eos)
    reference = Reference(order, vocab_size, tokens.tolist(), eos)
    for history in histories(rng, vocab_size, order, tokens, eos, number=30):
        probs_V = all_probs(model, tables, history)
        expected_V = [reference.probability(token, known(history)) for token in range(vocab_size)]
        np.testing.assert_allclose(probs_V, expected_V, rtol=1e-12, atol=0)
        assert abs(probs_V.sum() - 1) < 1e-12
        assert probs_V.min() > 0


def test_the_random_texts_reach_estimated_discounts_and_the_fallback():
    estimated = []
    for order, vocab_size, length, seed in CASES:
        rng = np.random.default_rng(100 * seed + order)
        tokens, eos = zipf_text(rng, vocab_size, length), int(rng.integers(vocab_size))
        discounts = Reference(order, vocab_size, tokens.tolist(), eos).discounts
        estimated += [(order, k, discounts[k] != (0.5, 1.0, 1.5)) for k in discounts]
    assert {flag for _, _, flag in estimated} == {True, False}
    assert {k for order, k, flag in estimated if flag and order == 5} >= {2, 3, 4, 5}


def test_many_rows_at_once_equal_one_by_one():
    rng = np.random.default_rng(7)
    tokens = zipf_text(rng, 20, 500)
    model, _, tables = fit(4, 20, tokens)
    history_NH = histories(rng, 20, 4, tokens, 0, number=200)
    targets_N = rng.integers(0, 20, size=200)
    together_N = model.log_probs(tables, history_NH, targets_N)
    assert together_N.dtype == np.float64
    alone_N = [model.log_probs(tables, history_NH[i : i + 1], targets_N[i : i + 1])[0] for i in range(200)]
    np.testing.assert_array_equal(together_N, alone_N)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_stored_keys_spell_the_texts_ngrams(order):
    rng = np.random.default_rng(order)
    tokens, eos = zipf_text(rng, 15, 250), 14  # an eos that the text itself does not contain
    _, params, _ = fit(order, 15, tokens, eos)
    reference = Reference(order, 15, tokens.tolist(), eos)
    shorter = [()]
    for k in range(1, order + 1):
        keys, counts = params[f"order_{k}"]["keys"], params[f"order_{k}"]["counts"]
        assert keys.dtype == counts.dtype == np.int64
        assert (np.diff(keys) > 0).all()
        ngrams = [(*shorter[key // 15], key % 15) for key in keys.tolist()]
        stored = dict(zip(ngrams, counts.tolist(), strict=True))
        if k == 1:
            assert stored.pop((eos,)) == 0  # a history, never a target
        assert stored == reference.counts[k]
        shorter = ngrams
    assert set(params) == {f"order_{k}" for k in range(1, order + 1)}
    assert Ngram.num_entries(params) == sum(len(counts) for counts in reference.counts.values())


def test_discounts_by_hand():
    # n1 = 4, n2 = 2, n3 = 1, n4 = 1: Y = 4/8, D1 = 1 - 2 (1/2) 2/4, D2 = 2 - 3 (1/2) 1/2, D3+ = 3 - 4 (1/2) 1/1.
    np.testing.assert_allclose(modified_discounts(np.array([1, 0, 1, 4, 2, 1, 9, 3, 2, 1])), [0, 0.5, 1.25, 1], rtol=1e-15)


@pytest.mark.parametrize(
    "counts",
    [
        [],
        [1, 1, 1],  # no n2
        [2, 3, 4],  # no n1
        [1, 2, 4],  # no n3
        [7, 8],
        [1] * 4 + [2, 3],  # D2 = 2 - 3 (2/3) 1/1 = 0
        [1] * 4 + [2] * 2 + [3] + [4] * 3,  # D3+ = 3 - 4 (1/2) 3/1 = -3
    ],
)
def test_discounts_fall_back_where_the_estimate_is_undefined_or_not_positive(counts):
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(modified_discounts(np.array(counts, np.int64)), [0, 0.5, 1, 1.5])


def test_unigram_by_hand():
    # Counts 4, 3, 2, 2, 1, 1, 1, 1 of 15; tokens 0 (the eos) and 9 never occur. D1, D2, D3+ = 0.5, 1.25, 1 as above, so
    # gamma = (4 * 0.5 + 2 * 1.25 + 2 * 1) / 15 = 6.5 / 15, and each token gets (count - D) / 15 + 6.5 / 150.
    tokens = [1, 5, 1, 2, 3, 1, 2, 6, 4, 2, 3, 7, 1, 4, 8]
    model, params, tables = fit(1, 10, tokens)
    expected_V = np.array([6.5, 36.5, 26.5, 14, 14, 11.5, 11.5, 11.5, 11.5, 6.5]) / 150
    np.testing.assert_allclose(all_probs(model, tables, []), expected_V, rtol=1e-14)
    assert model.num_entries(params) == 8


def test_a_word_seen_after_one_word_only_gets_little_unigram_mass():
    eos, san, francisco, dog, a, the, my = range(7)
    tokens = [san, francisco] * 4 + [a, dog, the, dog, my, dog]
    model, params, tables = fit(2, 7, tokens, eos)
    # Left neighbours: san {eos, francisco}, francisco {san}, dog {a, the, my}, and one each for a, the, my: 9 in all.
    # The discounts fall back to 0.5, 1, 1.5, so gamma = (4 * 0.5 + 1 + 1.5) / 9 = 1/2.
    assert params["order_1"]["counts"].tolist() == [0, 2, 1, 3, 1, 1, 1]
    unigram_V = all_probs(model, tables, [-1])
    np.testing.assert_allclose(unigram_V[[francisco, dog, eos]], [0.5 / 9 + 0.5 / 7, 1.5 / 9 + 0.5 / 7, 0.5 / 7], rtol=1e-14)
    assert tokens.count(francisco) > tokens.count(dog)
    assert unigram_V[francisco] < unigram_V[dog]
    # After san it is another matter: 4 of 4, discounted by 1.5.
    after_san_V = all_probs(model, tables, [san])
    np.testing.assert_allclose(after_san_V[francisco], 2.5 / 4 + 1.5 / 4 * unigram_V[francisco], rtol=1e-14)
    # With raw unigram counts, the same word is the likelier one.
    plain, _, plain_tables = fit(1, 7, tokens, eos)
    plain_V = all_probs(plain, plain_tables, [])
    assert plain_V[francisco] > plain_V[dog]


def test_the_leading_eos_is_a_history_though_no_target():
    model, params, tables = fit(3, 4, [1, 2, 1, 2, 1, 3], eos=0)
    assert params["order_1"]["counts"][0] == 0
    # Bigrams, left neighbours: (0 1) the beginning, (1 2) {0, 2}, (2 1) {1}, (1 3) {2}: the history 0 knows its follower.
    assert params["order_2"]["keys"].tolist() == [0 * 4 + 1, 1 * 4 + 2, 1 * 4 + 3, 2 * 4 + 1]
    assert params["order_2"]["counts"].tolist() == [1, 2, 1, 1]
    after_eos_V, nothing_known_V = all_probs(model, tables, [-1, 0]), all_probs(model, tables, [-1, -1])
    np.testing.assert_allclose(after_eos_V[1], 0.5 + 0.5 * nothing_known_V[1], rtol=1e-14)
    np.testing.assert_allclose(after_eos_V[3], 0.5 * nothing_known_V[3], rtol=1e-14)


def test_nothing_left_of_an_unknown_token_is_used():
    rng = np.random.default_rng(3)
    tokens = zipf_text(rng, 10, 400)
    model, _, tables = fit(4, 10, tokens)
    for a, b in rng.integers(0, 10, size=(20, 2)):
        np.testing.assert_array_equal(all_probs(model, tables, [a, -1, b]), all_probs(model, tables, [-1, -1, b]))
    np.testing.assert_array_equal(all_probs(model, tables, [1, 0, -1]), all_probs(model, tables, [-1, -1, -1]))
    bigram, _, bigram_tables = fit(2, 10, tokens)
    assert not np.allclose(all_probs(model, tables, [-1, -1, 1]), all_probs(bigram, bigram_tables, [1]))  # counts differ


def test_an_unknown_token_is_not_mistaken_for_the_last_of_the_vocabulary():
    # The key of (1, -1) would be that of (0, 2), after which the text has a 1.
    model, params, tables = fit(3, 3, [1, 0, 2, 1, 0, 2, 1])
    assert 0 * 3 + 2 in params["order_2"]["keys"]
    assert not np.allclose(all_probs(model, tables, [0, 2]), all_probs(model, tables, [-1, -1]))
    np.testing.assert_array_equal(all_probs(model, tables, [1, -1]), all_probs(model, tables, [-1, -1]))


@pytest.mark.parametrize("tokens", [[], [2], [2, 1]])
def test_a_text_shorter_than_the_order(tokens):
    model, params, tables = fit(5, 3, tokens)
    reference = Reference(5, 3, tokens, eos=0)
    for history in ([-1, -1, -1, 0], [-1, -1, 0, 2], [-1, 0, 2, 1], [0, 2, 1, 1], [1, 1, 1, 1], [-1, -1, -1, -1]):
        probs_V = all_probs(model, tables, history)
        expected_V = [reference.probability(token, known(history)) for token in range(3)]
        np.testing.assert_allclose(probs_V, expected_V, rtol=1e-12)
        assert abs(probs_V.sum() - 1) < 1e-12
    assert model.num_entries(params) == sum(len(counts) for counts in reference.counts.values())
    if not tokens:
        assert math.isclose(probs_V[0], 1 / 3, rel_tol=1e-15)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_narrow_token_types_do_not_overflow(dtype):
    rng = np.random.default_rng(5)
    tokens = zipf_text(rng, 250, 2000)
    model, params, tables = fit(3, 250, tokens)
    narrow = model.count(tokens.astype(dtype), 0)
    for name, entries in params.items():
        np.testing.assert_array_equal(narrow[name]["keys"], entries["keys"])
        np.testing.assert_array_equal(narrow[name]["counts"], entries["counts"])
    history_NH, targets_N = np.stack([tokens[:-2], tokens[1:-1]], axis=1), tokens[2:]
    np.testing.assert_array_equal(
        model.log_probs(tables, history_NH.astype(dtype), targets_N.astype(dtype)),
        model.log_probs(tables, history_NH, targets_N),
    )


@pytest.mark.parametrize("bad", [4, 99, -1])
def test_training_tokens_outside_the_vocabulary(bad):
    model = Ngram(3, 4)
    with pytest.raises(
        UserError, match=rf"^the training split: token id {bad} is outside the vocabulary, ids must be from 0 to 3$"
    ):
        model.count(np.array([1, 2, bad, 3]), 0)
    with pytest.raises(UserError, match=rf"^eos: token id {bad} is outside the vocabulary, ids must be from 0 to 3$"):
        model.count(np.array([1, 2, 3]), bad)


def test_scored_tokens_outside_the_vocabulary():
    model, _, tables = fit(2, 4, [1, 2, 3, 1])
    for bad in (4, -1):
        with pytest.raises(UserError, match=rf"^the targets: token id {bad} is outside the vocabulary, ids must be from 0 to 3$"):
            model.log_probs(tables, np.array([[1]]), np.array([bad]))
    for bad in (4, -2):
        with pytest.raises(
            UserError, match=rf"^the history: token id {bad} is outside the vocabulary, ids must be from -1 to 3$"
        ):
            model.log_probs(tables, np.array([[bad]]), np.array([1]))
