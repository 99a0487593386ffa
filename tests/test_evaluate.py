"""lm.evaluation.evaluate: a figure is stored with its protocol, under a name that tells, and test is scored once."""

import dataclasses
import gzip
import hashlib
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from helpers import changed, draft, refused, untrained_run, write_corpus

from lm.config import Config, replaced, resolve
from lm.data import tokenizers
from lm.evaluation import evaluate
from lm.evaluation.evaluate import evaluate_run
from lm.evaluation.perplexity import Layout
from lm.evaluation.variants import PLAIN, Dynamic, Variant
from lm.models.build import build
from lm.runs.checkpoint import Checkpoints
from lm.runs.folder import RunFolder
from lm.runs.open import Run, open_run

FIELDS = {"loss", "perplexity", "bits_per_byte", "word_perplexity", "nll_sum", "split", "text", "tokens", "bytes", "words"}
FIELDS |= {"text_sha256", "tokenizer", "protocol", "checkpoint", "seconds", "times_scored"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), train=60, valid=10, test=12)


@pytest.fixture(scope="module")
def lstm(corpus, tmp_path_factory):
    """A folder with the checkpoints 1 (the best) and 2."""
    return untrained_run(draft(corpus, evaluation__rows=3), tmp_path_factory.mktemp("lstm"), scale=4.0, steps=(1, 2))


@pytest.fixture(scope="module")
def ngram(corpus, tmp_path_factory):
    return untrained_run(draft(corpus, "ngram", model__ngram_order=3, data__tokenizer="word"), tmp_path_factory.mktemp("ngram"))


@pytest.fixture
def never(monkeypatch):
    """Scoring fails the test."""
    return lambda: monkeypatch.setattr(evaluate, "token_losses", lambda *args: pytest.fail("it was scored again"))


def stored(workdir, name):
    record = json.loads((workdir / "evaluation" / f"{name}.json").read_text())
    with np.load(workdir / "evaluation" / f"{name}.npz") as arrays:
        return record, arrays["targets"], arrays["nll"]


def test_a_figure_is_stored_with_its_protocol_and_can_be_recomputed(lstm, corpus):
    told = []
    found = evaluate_run(open_run(str(lstm)), "valid", progress=lambda scored, total: told.append((scored, total)))
    record, targets, nll = stored(lstm, "valid")
    assert {**record, "name": "valid", "stored": False} == found
    assert set(record) == FIELDS

    text = (corpus / "valid.txt").read_text()
    split = open_run(str(lstm)).facts["splits"]["valid"]
    assert (record["split"], record["text"], record["text_sha256"]) == ("valid", str(corpus / "valid.txt"), split)
    assert (record["tokens"], record["bytes"], record["words"]) == (len(text), len(text.encode()), len(text.split()))
    tokenizer = tokenizers.load(lstm / "tokenizer.json")
    assert record["tokenizer"] == {"name": "char", "sha256": tokenizers.sha256(tokenizer), "vocab_size": tokenizer.vocab_size}
    assert record["protocol"] == {"context": None, "stride": None, "precision": "float32", "adaptation": None}
    assert record["checkpoint"] == {"step": 1, "which": "best", "params_sha256": open_run(str(lstm)).params_sha256}
    assert {total for _, total in told} == {len(text)} and sum(scored for scored, _ in told) == len(text)

    assert (targets.dtype, nll.dtype) == (np.int32, np.float32)
    assert tokenizer.decode(targets) == text
    total = math.fsum(map(float, nll))
    assert record["nll_sum"] == pytest.approx(total, rel=1e-12)
    assert record["loss"] == pytest.approx(total / len(text), rel=1e-12)
    assert record["perplexity"] == pytest.approx(math.exp(total / len(text)), rel=1e-12)
    assert record["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-12)
    assert record["word_perplexity"] == pytest.approx(math.exp(total / len(text.split())), rel=1e-9)


def test_a_carried_figure_is_of_one_stream_however_many_rows_the_looks_at_valid_have(lstm):
    run = open_run(str(lstm))
    evaluate_run(run, "valid")
    _, targets, nll = stored(lstm, "valid")
    inputs = np.append(run.tokenizer.eos, targets[:-1])[None]
    hidden_BTD, _ = run.model.apply({"params": run.params}, inputs)
    logits_BTV = run.model.apply({"params": run.params}, hidden_BTD, method="logits")
    wanted = -jax.nn.log_softmax(logits_BTV)[0, np.arange(len(targets)), targets]
    np.testing.assert_allclose(nll, wanted, rtol=0, atol=1e-4)


def test_test_is_scored_once(lstm, never):
    first = evaluate_run(open_run(str(lstm)))
    assert (first["split"], first["stored"], first["times_scored"]) == ("test", False, 1)
    before = (lstm / "evaluation" / "test.json").read_bytes()
    never()
    again = evaluate_run(open_run(str(lstm)), "test")
    assert again["stored"] is True and again["times_scored"] == 1
    assert {**again, "stored": False} == first
    assert (lstm / "evaluation" / "test.json").read_bytes() == before


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_figure_without_the_losses_of_its_tokens_is_made_again(damage, corpus, tmp_path):
    run = open_run(str(untrained_run(draft(corpus, "ngram"), tmp_path)))
    first = evaluate_run(run, "valid")
    damage(run.folder.evaluation / "valid.npz")
    again = evaluate_run(run, "valid")
    assert not again["stored"] and again["loss"] == first["loss"] and again["times_scored"] == 2
    assert evaluate_run(run, "valid")["stored"]
    assert sorted(path.name for path in run.folder.evaluation.iterdir()) == ["valid.json", "valid.npz"]


def test_a_corpus_that_has_moved_is_the_same_text(lstm, corpus, tmp_path, never):
    evaluate_run(open_run(str(lstm)))
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_bytes((corpus / f"{name}.txt").read_bytes())
    never()
    assert evaluate_run(open_run(str(lstm)), data_path=str(tmp_path))["times_scored"] == 1


def test_what_is_not_the_run_s_own_figure_has_a_name_that_says_so(lstm, corpus, tmp_path):
    run, latest, second = (open_run(str(lstm), step) for step in ("best", "latest", "2"))
    (tmp_path / "my text (1).txt").write_text("a cat\n")
    names = [
        evaluate_run(run, "valid", context=8, stride=4)["name"],
        evaluate_run(run, "valid", context=8)["name"],
        evaluate_run(latest, "valid")["name"],
        evaluate_run(second, "valid", context=8)["name"],
        evaluate_run(run, text=str(tmp_path / "my text (1).txt"))["name"],
        evaluate_run(latest, text=str(tmp_path / "my text (1).txt"))["name"],
    ]
    digest = hashlib.sha256(b"a cat\n").hexdigest()[:8]
    assert names == [
        "valid.context-8-stride-4",
        "valid.context-8-stride-2",
        "valid.step-2",
        "valid.step-2.context-8-stride-2",
        f"text-{digest}-my-text-1-.txt",
        f"text-{digest}-my-text-1-.txt.step-2",
    ]
    for name in names:
        record, _, nll = stored(lstm, name)
        assert record["nll_sum"] == pytest.approx(math.fsum(map(float, nll)), rel=1e-12)
    assert stored(lstm, names[0])[0]["protocol"] == {"context": 8, "stride": 4, "precision": "float32", "adaptation": None}
    assert stored(lstm, names[2])[0]["checkpoint"] == {"step": 2, "which": "latest", "params_sha256": latest.params_sha256}
    losses = {stored(lstm, name)[0]["loss"] for name in ("valid.context-8-stride-4", "valid.context-8-stride-2")}
    assert len(losses) == 2  # another context is another figure


def test_a_config_with_windows_asks_for_them(corpus, tmp_path, never):
    config = draft(corpus, "rnn", evaluation__context=16, evaluation__stride=4)
    run = open_run(str(untrained_run(config, tmp_path)))
    found = evaluate_run(run, "valid")
    assert found["name"] == "valid" and (found["protocol"]["context"], found["protocol"]["stride"]) == (16, 4)
    assert evaluate_run(run, "valid", context=16, stride=8)["name"] == "valid.context-16-stride-8"
    never()
    assert evaluate_run(run, "valid", context=16, stride=4)["stored"]  # the config's own
    assert evaluate_run(run, "valid", context=16)["stored"]  # a quarter is what is usual
    assert evaluate_run(run, "valid")["stored"]


def test_windows_longer_than_the_learned_positions_are_refused(corpus, tmp_path):
    learned = draft(corpus, "transformer", model__positions="learned", model__max_positions=16)
    with refused("a text of 20 tokens is longer than model.max_positions 16"):
        evaluate_run(open_run(str(untrained_run(learned, tmp_path))), "valid", context=20)


def test_any_text_can_be_scored_with_the_run_s_tokenizer(ngram, tmp_path):
    (tmp_path / "other.txt.gz").write_bytes(gzip.compress(b"the cat xyzzy\n\nsat"))
    run = open_run(str(ngram))
    found = evaluate_run(run, text=str(tmp_path / "other.txt.gz"))
    record, targets, nll = stored(ngram, found["name"])
    assert re.fullmatch(r"text-[0-9a-f]{8}-other\.txt\.gz", found["name"])
    assert (found["split"], found["tokens"], found["bytes"], found["words"]) == ("text", 7, 18, 4)
    symbols = [run.tokenizer.symbols[i] for i in targets]
    assert symbols == ["the", "cat", "<unk>", "<eos>", "<eos>", "sat", "<eos>"]
    assert record["protocol"]["precision"] == "float64" and len(nll) == 7
    # the same text scored as a split of the run gives the same figure
    assert evaluate_run(run, text=str(tmp_path / "other.txt.gz"))["stored"]
    (tmp_path / "other.txt.gz").write_bytes(gzip.compress(b"the dog\n"))
    changed = evaluate_run(run, text=str(tmp_path / "other.txt.gz"))
    assert (changed["stored"], changed["tokens"], changed["times_scored"]) == (False, 3, 1)
    assert changed["name"] != found["name"]  # files of one name do not overwrite each other's figures


def test_the_text_of_a_split_is_the_split(ngram, corpus):
    run = open_run(str(ngram))
    split, text = evaluate_run(run, "valid"), evaluate_run(run, text=str(corpus / "valid.txt"))
    assert split["nll_sum"] == text["nll_sum"] and split["text_sha256"] == text["text_sha256"]
    assert split["tokens"] == split["words"] + 10  # one eos a line


def test_another_text_than_the_run_was_made_for_is_refused(corpus, tmp_path):
    own = write_corpus(tmp_path / "own", train=60, valid=10, test=12)
    run = open_run(str(untrained_run(draft(own, "ngram"), tmp_path / "run")))
    (own / "test.txt").write_text("something else\n")
    with refused("the test text of", str(own / "test.txt"), "is not the one this run was made for", "--data_path", "--text"):
        evaluate_run(run, "test")
    assert evaluate_run(run, "test", data_path=str(corpus))["stored"] is False  # the same text stands there
    with refused("the test text of", "is not the one"):
        evaluate_run(run, "test", data_path=str(own))


def test_another_checkpoint_or_protocol_is_not_taken_for_the_stored_one(corpus, tmp_path):
    run = open_run(str(untrained_run(draft(corpus, "ngram"), tmp_path)))
    first = evaluate_run(run, "valid")
    path = tmp_path / "evaluation" / "valid.json"
    record = json.loads(path.read_text())
    for change in (
        {"checkpoint": {"step": 9, "which": "best"}},
        {"text_sha256": "another"},
        {"protocol": {**record["protocol"], "precision": "bfloat16"}},
        {"tokenizer": {**record["tokenizer"], "sha256": "another"}},
    ):
        path.write_text(json.dumps({**record, **change}))
        again = evaluate_run(run, "valid")
        assert again["stored"] is False and again["times_scored"] == 2, change
        assert again["loss"] == first["loss"]
    path.write_text("{damaged")
    with refused(str(path), "is damaged", "remove it, and the text is scored again"):
        evaluate_run(run, "valid")
    path.write_text("[]")
    with refused(str(path), "is damaged: it holds no JSON object"):
        evaluate_run(run, "valid")


def test_a_run_in_training_is_opened_at_what_is_there(corpus, tmp_path, monkeypatch):
    """Its checkpoints are replaced: one that was chosen can be gone when it is read."""
    workdir = untrained_run(draft(corpus), tmp_path, steps=(1, 2))
    choose, chosen = Checkpoints.choose, []

    def and_remove(self, which):
        chosen.append(choose(self, which))
        if len(chosen) == 1:
            shutil.rmtree(workdir / "checkpoints" / "1")
        return chosen[-1]

    monkeypatch.setattr(Checkpoints, "choose", and_remove)
    run = open_run(str(workdir))
    assert (run.step, run.which) == (2, "latest") and chosen == [(1, "best"), (2, "latest")]
    monkeypatch.setattr(Checkpoints, "choose", lambda self, which: (1, "best"))
    with refused("is in training", "try again"):
        open_run(str(workdir))


def test_bad_values_are_refused(lstm, tmp_path):
    run = open_run(str(lstm))
    with refused("--split=dev is not a split", "train, valid, test"):
        evaluate_run(run, "dev")
    with refused("--text=nowhere.txt is not a file"):
        evaluate_run(run, text="nowhere.txt")
    with refused("is not a file"):
        evaluate_run(run, text="x" * 5000)
    with refused(f"--text={tmp_path} is not a file"):
        evaluate_run(run, text=str(tmp_path))
    with refused("--stride is set without --context"):
        evaluate_run(run, stride=3)
    with refused("--stride=9", "at most --context=8", "left out"):
        evaluate_run(run, context=8, stride=9)
    with refused("--stride=0", "at least 1"):
        evaluate_run(run, context=8, stride=0)
    for context in (0, -8):
        with refused(f"--context={context} must be at least 1"):
            evaluate_run(run, context=context)
    with refused("score valid with the same flags first"):
        evaluate_run(run, "test", context=5)
    evaluate_run(run, "valid", context=5)
    with refused("score valid with the same flags first"):
        evaluate_run(run, "test", context=5, stride=2)
    assert evaluate_run(run, "test", context=5)["name"] == "test.context-5-stride-1"
    with refused("--data_path is set, but with --text nothing of the run's corpus is read"):
        evaluate_run(run, text=str(tmp_path / "text.txt"), data_path=str(tmp_path))
    with refused(f"config.data.path '{tmp_path / 'x'}' does not exist"):
        evaluate_run(run, data_path=str(tmp_path / "x"))
    with refused("--data_path is set", "'python_docs'", "has no path"):
        evaluate_run(dataclasses.replace(run, config=resolve(Config())), data_path=str(tmp_path))


def test_a_folder_that_cannot_be_written(ngram, corpus, tmp_path, never):
    run = open_run(str(untrained_run(draft(corpus, "ngram"), tmp_path)))
    (tmp_path / "evaluation").write_text("in the way")
    never()  # it is told before the time that scoring takes
    with refused(str(tmp_path / "evaluation"), "cannot be"):
        evaluate_run(run, "valid")


def test_a_token_cache_that_cannot_be_written_here_is_not_needed(corpus, tmp_path):
    """The run was trained with one elsewhere."""
    run = open_run(str(untrained_run(draft(corpus, "ngram", data__cache_dir=str(tmp_path / "cache")), tmp_path / "run")))
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("in the way")
    assert evaluate_run(run, "valid")["tokens"]


def test_a_stored_figure_needs_no_text_any_more(tmp_path):
    own = write_corpus(tmp_path / "own", train=60, valid=10, test=12)
    run = open_run(str(untrained_run(draft(own, "ngram"), tmp_path / "run")))
    first = evaluate_run(run, "test")
    shutil.rmtree(own)
    assert evaluate_run(run, "test") == {**first, "stored": True}
    with refused("does not exist", "--data_path"):
        evaluate_run(run, "valid")


def test_a_figure_of_a_fallback_does_not_take_the_best_one_s_place(corpus, tmp_path):
    workdir = untrained_run(draft(corpus), tmp_path / "run", steps=(1, 2))
    best = evaluate_run(open_run(str(workdir)), "test")
    (workdir / "checkpoints" / "1" / "progress.json").write_text("{}")
    other = evaluate_run(open_run(str(workdir)), "test")
    assert (best["name"], other["name"], other["checkpoint"]["which"]) == ("test", "test.step-2", "latest")
    assert stored(workdir, "test")[0]["times_scored"] == 1


def test_parameters_that_have_diverged_give_no_figure(corpus, tmp_path):
    run = open_run(str(untrained_run(draft(corpus), tmp_path / "run")))
    bad = dataclasses.replace(run, params=jax.tree.map(lambda x: x * np.nan, run.params))
    with refused("no finite loss", "diverged"):
        evaluate_run(bad, "valid")
    assert not (run.folder.evaluation / "valid.json").exists()


def test_a_run_of_many_devices_is_scored_on_those_there_are(corpus, tmp_path):
    config = draft(corpus, "transformer", evaluation__context=8, evaluation__stride=4)
    run = open_run(str(untrained_run(config, tmp_path / "run")))
    wide = dataclasses.replace(run, config=replaced(run.config, "data"))
    object.__setattr__(wide.config, "num_devices", 64)
    assert evaluate_run(wide, "valid")["nll_sum"] == pytest.approx(evaluate_run(run, "valid")["nll_sum"], rel=1e-6)


def test_what_is_spread_over_devices(monkeypatch):
    """Windows and what a mesh holds; a carried stream is one row, and dynamic evaluation one model."""
    monkeypatch.setattr(evaluate, "place", lambda config, or_fewer: "all")
    dynamic = Variant(Dynamic())
    for architecture, context, parallelism, variant, spread in (
        ("transformer", 8, "pmap", PLAIN, True),
        ("transformer", 7, "pmap", PLAIN, True),
        ("transformer", 8, "sharded", PLAIN, True),
        ("lstm", None, "pmap", PLAIN, False),
        ("lstm", None, "sharded", PLAIN, True),
        ("lstm", None, "sharded", dynamic, False),
    ):
        config = resolve(changed(Config(), model__architecture=architecture, data__order="windows", parallelism=parallelism))
        run = Run(None, config, {}, None, build(config, 10), {}, 1, "best")
        found = evaluate._placement(run, Layout(context, context and 4, 16), variant)
        assert (found == "all") == spread, (architecture, context, parallelism)


def test_other_parameters_of_the_same_step_are_scored_anew(corpus, tmp_path):
    """Of a run whose checkpoints were removed and that was trained again."""
    workdir = untrained_run(draft(corpus), tmp_path / "run")
    first = evaluate_run(open_run(str(workdir)), "valid")
    shutil.rmtree(workdir / "checkpoints")
    untrained_run(draft(corpus, seed=1), tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "checkpoints", workdir / "checkpoints")
    again = evaluate_run(open_run(str(workdir)), "valid")
    assert not again["stored"] and again["nll_sum"] != first["nll_sum"] and again["times_scored"] == 2
    assert evaluate_run(open_run(str(workdir)), "valid")["stored"]


def test_opening_a_run(lstm, tmp_path):
    run = open_run(str(lstm))
    assert (run.step, run.which, run.config.model.hidden_dim) == (1, "best", 8)
    assert run.facts["vocab_size"] == run.tokenizer.vocab_size == run.params["embedding"]["table"].shape[0]
    with refused(str(tmp_path), "holds no run"):
        open_run(str(tmp_path))
    RunFolder(tmp_path).write_config(draft(tmp_path), run.config, run.facts)
    with refused(str(tmp_path), "no checkpoint yet", "train it first"):
        open_run(str(tmp_path))


def test_a_run_whose_tokenizer_has_changed_is_refused(corpus, tmp_path):
    workdir = untrained_run(draft(corpus), tmp_path / "run")
    path = workdir / "tokenizer.json"
    path.write_text(path.read_text().replace('"a", "b"', '"b", "a"'))
    with refused(str(path), "not the one that this run was trained with"):
        open_run(str(workdir))
