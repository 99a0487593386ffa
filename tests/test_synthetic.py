"""lm.data.synthetic: every character's nats recomputed from the law, entropy rates, and a floor that only a leak gets under."""

import dataclasses
import itertools
import math
import string

import numpy as np
import pytest
from helpers import changed, refused, untrained_run

from lm.config import Config, resolve
from lm.data import corpus, sources, synthetic
from lm.evaluation.evaluate import evaluate_run
from lm.reporting.report import compare
from lm.runs.open import open_run

SMALL = {
    "markov": dict(data__alphabet_size=3, data__markov_order=2),
    "hidden_markov": dict(data__alphabet_size=3, data__num_states=3),
    "copy": dict(data__alphabet_size=5, data__copy_length=4),
    "dyck": dict(data__max_depth=3),
}


def config(process, num_characters=20_000, **fields):
    fields = {"data__source": "synthetic", "data__process": process, "data__tokenizer": "char", **SMALL[process], **fields}
    return changed(Config(), data__num_characters=num_characters, **fields)


def sample(process, split="train", **fields):
    """The process, a text and the nats of its characters."""
    data = resolve(config(process, **fields)).data
    pieces = list(synthetic.text(data, split))
    return synthetic.process(data), "".join(text for text, _ in pieces), np.concatenate([nats for _, nats in pieces])


def letters(text):
    return [string.ascii_lowercase.index(letter) for letter in text]


@pytest.mark.parametrize("process", SMALL)
def test_a_text_has_its_length_its_seed_and_a_nat_for_each_character(process):
    _, text, nats = sample(process)
    assert len(text) == nats.size == 20_000 and np.all(nats >= 0)
    assert sample(process)[1] == text
    valid, test = sample(process, "valid")[1], sample(process, "test")[1]
    assert len(valid) == len(test) == 2_000 and len({valid, test, text[:2_000]}) == 3
    assert sample(process, data__synthetic_seed=1)[1] != text


def markov_nats(law, text):
    history, size, found = (0,) * (law.probs.ndim - 1), law.probs.shape[-1], []
    assert law.probs.shape == (size,) * (len(history) + 1)
    for symbol in letters(text):
        found.append(-math.log(law.probs[history][symbol]))
        history = (*history[1:], symbol)
    return found


def hidden_markov_prob(law, symbols):
    """Of a text, summed over all ways through the hidden states."""
    total, states = 0.0, range(len(law.transition_SS))
    for path in itertools.product(states, repeat=len(symbols)):
        prob = law.stationary_S[path[0]]
        for here, there in itertools.pairwise(path):
            prob *= law.transition_SS[here, there]
        total += prob * math.prod(law.emission_SA[state, symbol] for state, symbol in zip(path, symbols, strict=True))
    return total


def test_nats_of_a_markov_chain():
    law, text, nats = sample("markov", num_characters=40_000)
    np.testing.assert_allclose(nats, markov_nats(law, text), rtol=1e-12)
    assert law.probs.std() > 0.1  # contexts do matter


def test_nats_of_a_hidden_markov_model_sum_over_all_paths():
    law, text, nats = sample("hidden_markov")
    np.testing.assert_allclose(law.stationary_S @ law.transition_SS, law.stationary_S, atol=1e-12)
    for length in (1, 2, 6):
        assert nats[:length].sum() == pytest.approx(-math.log(hidden_markov_prob(law, letters(text[:length]))), rel=1e-9)


def test_lines_of_the_copy_task():
    _, text, nats = sample("copy")
    lines = text.split("\n")[:-1]
    assert {line[:4] == line[5:] and line[4] == "=" and len(line) == 9 for line in lines} == {True}
    assert set("".join(lines)) == set("abcde=")
    np.testing.assert_array_equal(nats[:10], [math.log(5)] * 4 + [0.0] * 6)


def test_lines_of_dyck_are_well_nested_and_as_deep_as_said():
    _, text, nats = sample("dyck", data__max_depth=3)
    stack, depths = [], []
    for character, nat in zip(text, nats, strict=True):
        depths.append(len(stack))
        expected = 0.0 if len(stack) == 3 else math.log(4) if character in "([" else math.log(2)
        assert nat == expected
        if character in "([":
            stack.append({"(": ")", "[": "]"}[character])
        elif character == "\n":
            assert not stack
        else:
            assert stack.pop() == character
    assert max(depths) == 3
    assert 0.45 < np.mean([character == "(" for character in text if character in "(["]) < 0.55


@pytest.mark.parametrize("process", SMALL)
def test_the_entropy_rate_is_what_a_long_text_comes_to(process):
    law, _, nats = sample(process, num_characters=200_000)
    rate = law.entropy_rate()
    blocks = nats.reshape(-1, 1000).mean(axis=1)  # far longer than any memory here, so nearly independent
    assert rate.error <= 1e-6
    assert abs(nats.mean() - rate.nats) <= 5 * blocks.std() / math.sqrt(len(blocks)) + rate.error + 1e-12


def test_the_bounds_of_a_hidden_markov_model_hold_where_the_rate_is_known():
    """Where each state emits a letter of its own the states are seen, and the rate is a Markov chain's."""
    rng = np.random.default_rng(3)
    transition_SS = rng.dirichlet([1.0] * 4, 4)
    chain = synthetic.MarkovChain(transition_SS).entropy_rate()
    hidden = synthetic.HiddenMarkov(transition_SS, np.eye(4)).entropy_rate()
    assert abs(hidden.nats - chain.nats) <= hidden.error + 1e-12
    slow = synthetic.HiddenMarkov(np.array([[0.999, 0.001], [0.001, 0.999]]), np.array([[0.6, 0.4], [0.4, 0.6]])).entropy_rate()
    assert 1e-7 < slow.error < 0.02  # a memory longer than any table: the bound says so
    assert slow.nats - slow.error < math.log(2)


def test_bad_fields_are_refused():
    for fields, parts in [
        (dict(data__tokenizer="word"), ["config.data.source is 'synthetic'", "char or byte"]),
        (dict(data__alphabet_size=26, data__markov_order=5), ["config.data.alphabet_size 26", "make one of them smaller"]),
        (dict(data__max_depth=2), ["config.data.max_depth is set", "'markov'", "dyck"]),
        (dict(data__path="x"), ["config.data.path is set", "'synthetic'"]),
    ]:
        with refused(*parts):
            resolve(config("markov", **fields))
    with refused("config.data.markov_order is set", "None"):
        resolve(changed(Config(), data__markov_order=2))


# --- the floor


def counted(process, folder, order, **fields):
    draft = config(
        process, model__architecture="ngram", model__ngram_order=order, data__cache_dir=str(folder / "cache"), **fields
    )
    return open_run(str(untrained_run(draft, folder / "run")))


def test_an_honest_model_comes_close_to_the_floor_from_above(tmp_path):
    run = counted("markov", tmp_path, 3, num_characters=100_000)
    found = {split: evaluate_run(run, split) for split in ("valid", "test")}
    law, _, nats = sample("markov", "test", num_characters=100_000)
    floor = found["test"]["floor"]
    assert floor["loss"] == pytest.approx(nats.mean(), rel=1e-12)
    assert floor["excess"] == pytest.approx(found["test"]["loss"] - nats.mean(), rel=1e-9)
    assert 0 < floor["excess"] < 0.002
    assert (floor["entropy_rate"], floor["entropy_rate_error"]) == (law.entropy_rate().nats, 0.0)
    table = compare({"counts": tmp_path / "run"}).table
    assert table.rows[0][table.headers.index("test excess, nats/token")] == f"{floor['excess']:.4f}"
    assert any("floor of this text" in note for note in table.notes)


def test_a_leak_is_an_error_and_keeps_no_figure(tmp_path):
    run = counted("markov", tmp_path, 12)
    evaluate_run(run, "test")  # counted on train, as it should be
    data = run.config.data
    tokens = corpus.tokenise(sources.load(data)["valid"], run.tokenizer, corpus.cache_dir(data)).tokens
    leaky = dataclasses.replace(run, params=run.model.count(tokens, run.tokenizer.eos))
    with refused("synthetic markov/valid", "leaked", "is not kept"):
        evaluate_run(leaky, "valid")
    assert not (run.folder.evaluation / "valid.json").exists()
    known = evaluate_run(run, "train")  # what a model has seen may lie below the floor of a fresh text
    assert known["floor"]["excess"] < 0
