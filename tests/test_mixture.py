"""Mixtures in lm.data.batches, and what they are made of: shares by weight, every step reached at once, each source counted."""

import json

import numpy as np
import pytest
from helpers import changed, corpus_of, draft, refused, write_corpus

from lm.config import Config, resolve
from lm.data import prepare, sources
from lm.data.batches import MixedStreams, MixedWindows, Packed, Padded, Stream, Windows, batches, whole_shares
from lm.data.prepare import Job
from lm.training.train import train

EOS = 9999
WHERE = {"own": (0, 211), "other": (1000, 1130), "third": (2000, 2057)}
CORPORA = {name: corpus_of(np.arange(*span), 10_000, EOS) for name, span in WHERE.items()}  # a token tells its corpus and place
WEIGHTS = (0.5, 0.3, 0.2)


def mixed(kind, batch_size=7, seq_len=5):
    if kind is Stream:
        return MixedStreams(CORPORA, WEIGHTS, batch_size, seq_len, seed=3)
    return MixedWindows(kind, CORPORA, WEIGHTS, batch_size, seq_len, seed=3)


def part_of(targets_BT):
    return targets_BT[:, 0] // 1000


@pytest.mark.parametrize("kind", [Stream, Windows, Packed, Padded])
def test_a_batch_is_a_pure_function_of_step_and_rows(kind):
    source, again = mixed(kind), mixed(kind)
    for step in (0, 9, 4, 1000, 31):
        whole = source.batch(step, slice(None))
        assert whole.inputs_BT.shape == source.shapes[0] == (7, 5)
        assert whole.rows_B.tolist() == list(range(7)) and whole.rows_B.dtype == np.int32
        for rows in (slice(0, 2), slice(2, 5), slice(5, None), slice(None)):
            part = again.batch(step, rows)
            for name, value in vars(whole).items():
                if value is None:
                    assert getattr(part, name) is None
                else:
                    assert getattr(part, name).dtype == value.dtype
                    np.testing.assert_array_equal(getattr(part, name), value[rows], err_msg=name)


@pytest.mark.parametrize("kind", [Windows, Packed, Padded])
def test_of_every_thousand_examples_each_part_has_its_share(kind):
    source = mixed(kind, batch_size=10)
    for block in range(2):
        targets = np.concatenate([source.batch(step, slice(None)).targets_BT for step in range(block * 100, block * 100 + 100)])
        assert np.bincount(part_of(targets)).tolist() == [500, 300, 200]
        some = np.bincount(part_of(targets[:200]), minlength=3)
        assert (some > 0).all() and some.tolist() != [200, 0, 0]
    assert source.counts(0) == {f"tokens_from/{name}": 0 for name in CORPORA}


def test_every_window_of_each_part_comes_once_in_its_epochs():
    source = mixed(Windows, batch_size=10)
    targets = np.concatenate([source.batch(step, slice(None)).targets_BT for step in range(100)])
    for part, (first, last) in enumerate(WHERE.values()):
        own = (targets[part_of(targets) == part] - first) // 5
        n = (last - first) // 5
        for epoch in range(len(own) // n):
            assert sorted(own[epoch * n : (epoch + 1) * n, 0]) == list(range(n))
    orders = [source.batch(step, slice(None)).targets_BT.tolist() for step in range(20)]
    other = MixedWindows(Windows, CORPORA, WEIGHTS, 10, 5, seed=4)
    assert orders != [other.batch(step, slice(None)).targets_BT.tolist() for step in range(20)]


@pytest.mark.parametrize("kind", [Stream, Windows, Packed])
def test_tokens_are_counted_by_part(kind):
    source, seen = mixed(kind), np.zeros(3, int)
    for step in range(330):
        batch = source.batch(step, slice(None))
        seen += np.bincount(part_of(batch.targets_BT), weights=batch.loss_weights_BT.sum(axis=1), minlength=3).astype(int)
        if step in (0, 1, 150, 329):
            assert source.counts(step + 1) == dict(zip((f"tokens_from/{name}" for name in CORPORA), seen.tolist(), strict=True))
    assert Windows(CORPORA["own"], 7, 5, seed=3).counts(5) == {}


@pytest.mark.parametrize("kind", [Stream, Windows, Padded])
def test_epochs_are_those_of_the_configs_own_text(kind):
    source, n = mixed(kind), 211 // 5 + (kind is Padded)
    own = 0
    for step in range(200):
        rows = part_of(source.batch(step, slice(None)).targets_BT) == 0
        if kind is Stream:
            n, own_before = 211 // rows.sum() // 5 * rows.sum(), step * rows.sum()
        else:
            own_before = own
        if kind is not Stream and not rows[0]:
            pass  # the step's first row is of another text
        assert source.epoch(step) == own_before // n, step
        own += rows.sum()
    if kind is not Stream:
        assert float(source.steps_per_epoch) == n / 7 / 0.5


def test_each_row_of_mixed_streams_goes_on_where_it_ended():
    source = mixed(Stream, batch_size=10)
    rows = [part_of(source.batch(step, slice(None)).targets_BT).tolist() for step in range(50)]
    assert rows == [[0] * 5 + [1] * 3 + [2] * 2] * 50
    for first, count, corpus in ((0, 5, CORPORA["own"]), (5, 3, CORPORA["other"]), (8, 2, CORPORA["third"])):
        alone = Stream(corpus, count, 5, seed=0)
        for step in range(50):
            ours, expected = source.batch(step, slice(first, first + count)), alone.batch(step, slice(None))
            np.testing.assert_array_equal(ours.targets_BT, expected.targets_BT)
            np.testing.assert_array_equal(ours.inputs_BT, expected.inputs_BT)
            np.testing.assert_array_equal(ours.reset_B, expected.reset_B)  # each part is emptied where its own epoch begins


def test_shares_are_whole_numbers():
    assert whole_shares((0.5, 0.3, 0.2), 10) == [5, 3, 2]
    assert whole_shares((0.5, 0.3, 0.2), 7) == [4, 2, 1]
    assert whole_shares((1 / 3, 1 / 3, 1 / 3), 1000) == [334, 333, 333]
    rng = np.random.default_rng(0)
    for _ in range(100):
        weights, total = rng.dirichlet(np.ones(4)), int(rng.integers(1, 50))
        found = np.array(whole_shares(weights, total))
        assert found.sum() == total and (np.abs(found - weights * total) < 1).all()


def test_shares_too_small_are_refused():
    with refused("(0.5, 0.3, 0.2)", "leave third none of the 2 rows", "order='windows'"):
        MixedStreams(CORPORA, WEIGHTS, 2, 5, seed=0)
    with refused("give third less than a share of 0.001"):
        MixedWindows(Windows, CORPORA, (0.6, 0.3999, 0.0001), 2, 5, seed=0)


@pytest.mark.parametrize(
    "fields, parts",
    [
        ({"mixture": ("a",)}, ("belong together",)),
        ({"mixture_weights": (0.5, 0.5)}, ("belong together",)),
        ({"mixture": ("a",), "mixture_weights": (1 / 3, 1 / 3, 1 / 3)}, ("must be 2 shares that add up to 1",)),
        ({"mixture": ("a",), "mixture_weights": (0.5, 0.4)}, ("must be 2 shares that add up to 1",)),
        ({"mixture": ("a",), "mixture_weights": (1.0, 0.0)}, ("config.data.mixture_weights",)),
        ({"mixture": ("a", "./a"), "mixture_weights": (0.5, 0.25, 0.25)}, ("names a folder twice",)),
    ],
)
def test_settings_that_do_not_fit(fields, parts):
    with refused(*parts):
        resolve(changed(Config(), **{f"data__{name}": value for name, value in fields.items()}))
    with refused("an n-gram counts one text"):
        ngram = changed(Config(), model__architecture="ngram", data__mixture=("a",), data__mixture_weights=(0.5, 0.5))
        resolve(ngram)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Two texts, and each of them prepared with the tokenizer of the first."""
    folder = tmp_path_factory.mktemp("mixture")
    own = write_corpus(folder / "own")
    for name, seed in (("wiki", 1), ("books", 2)):
        text = write_corpus(folder / f"{name} text", seed=seed)
        tokenizer = folder / "wiki" / "tokenizer.json"
        prepare.prepare(draft(text), folder / name, Job(), tokenizer=tokenizer if tokenizer.exists() else None)
    return own, folder


@pytest.mark.parametrize("order", ["stream", "windows"])
def test_training_on_a_mixture_resumes_and_counts(order, others, tmp_path):
    own, folder = others
    mixture = (str(folder / "wiki"), str(folder / "books"))
    settings = dict(data__mixture=mixture, data__mixture_weights=(0.25, 0.5, 0.25), data__order=order)
    settings |= dict(training__log_every_steps=2, training__evaluate_every_steps=2)
    train(draft(own, **settings, training__num_steps=6), str(tmp_path / "whole"))
    train(draft(own, **settings, training__num_steps=4), str(tmp_path / "parts"))
    train(draft(own, **settings, training__num_steps=6), str(tmp_path / "parts"))

    def lines(name):
        read = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if not key.startswith(("seconds", "tokens_per"))} for line in read]

    assert lines("whole") == lines("parts")
    counted = [
        [line[f"tokens_from/{name}"] for name in ("text", "wiki", "books")] for line in lines("whole") if line["split"] == "train"
    ]
    assert all(sum(tokens) == 2 * (number + 1) * 32 for number, tokens in enumerate(counted)) and len(counted) == 3
    if order == "stream":
        assert counted[-1] == [48, 96, 48]
    alone = draft(own, training__num_steps=6, training__evaluate_every_steps=2, data__order=order)
    train(alone, str(tmp_path / "alone"))
    assert [line["loss"] for line in lines("alone") if line["split"] == "valid"] != [
        line["loss"] for line in lines("whole") if line["split"] == "valid"
    ]
    other = {**settings, "data__mixture": mixture[::-1]}
    with refused("holds another experiment", "mixture"):
        train(draft(own, **other, training__num_steps=8), str(tmp_path / "whole"))


def test_folders_of_one_name_are_told_apart(others, tmp_path, monkeypatch):
    _, folder = others
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").symlink_to(folder / "wiki")  # named as the config's source is
    data = changed(Config(), data__source="text", data__mixture=("text", str(folder / "books"))).data
    assert list(sources.mixture(data)) == [str(tmp_path / "text"), str(folder / "books")]


def test_a_mixture_of_another_tokenizer_is_refused(others, tmp_path):
    own, folder = others
    settings = dict(data__mixture=(str(folder / "wiki"),), data__mixture_weights=(0.5, 0.5))
    with refused("wiki/train holds the tokens of another tokenizer"):
        train(draft(own, **settings, data__tokenizer="byte"), str(tmp_path / "run"))
    missing = {**settings, "data__mixture": (str(tmp_path / "nothing"),)}
    with refused("config.data.mixture", "no folder that launch.prepare_data has finished"):
        train(draft(own, **missing), str(tmp_path / "run"))


def test_a_mixture_of_documents_takes_no_open_text(others):
    """Its tokens would all be one document."""
    _, folder = others
    for order in ("packed", "padded"):
        data = changed(Config(), data__order=order, data__mixture=(str(folder / "wiki"),)).data
        with refused(f"config.data.order is {order!r}", "no document ends in the text of config.data.mixture", "wiki"):
            sources.mixture(data)


def test_the_config_chooses():
    for order, kind in (("stream", MixedStreams), ("windows", MixedWindows)):
        config = changed(Config(), data__order=order, data__seq_len=5, data__batch_size=4)
        config = resolve(changed(config, data__mixture=("a",), data__mixture_weights=(0.5, 0.5)))
        found = batches(config, CORPORA["own"], {"other": CORPORA["other"]})
        assert type(found) is kind and list(found.counts(1)) == ["tokens_from/python_docs", "tokens_from/other"]
