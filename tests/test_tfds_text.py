"""lm.data.tfds_text: a dataset made of local files, prepared, read back and trained from; what cannot be read is told."""

import os
import pathlib
import shutil
import time
from unittest import mock

import numpy as np
import pytest
from helpers import changed, draft, refused, write_corpus

from lm.config import Config
from lm.data import corpus, sources, tfds_text, tokenizers
from lm.data.lines import read_lines
from lm.data.tfds_text import prepare_text_files
from lm.evaluation.evaluate import evaluate_run
from lm.runs.open import open_run
from lm.training.train import train

pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), train=300, valid=30, test=30)


@pytest.fixture(scope="module")
def prepared(files):
    return prepare_text_files({split: files / f"{split}.txt" for split in sources.SPLITS}, files / "datasets")


def config(files, prepared, **fields):
    return draft(files, **{"data__source": "tfds", "data__path": str(prepared), "data__examples": "pieces", **fields})


@pytest.mark.parametrize("tokenizer", ["char", "byte", "word", "subword"])
def test_the_token_stream_is_that_of_the_text_source(files, prepared, tokenizer):
    fields = dict(data__tokenizer=tokenizer, data__vocab_size=300 if tokenizer == "subword" else None)
    found = {}
    for source in (config(files, prepared, **fields), draft(files, **fields)):
        cache = corpus.cache_dir(source.data)
        changed(source, data__min_count=1)
        splits = sources.load(source.data)
        tokenizer_ = tokenizers.train(source.data, splits["train"], cache)
        found[source.data.source] = {
            split: (splits[split].size, np.array(corpus.tokenise(splits[split], tokenizer_, cache).tokens)) for split in splits
        }
    for split in sources.SPLITS:
        (size, tokens), (text_size, text_tokens) = found["tfds"][split], found["text"][split]
        assert size == text_size and len(tokens) > 20
        np.testing.assert_array_equal(tokens, text_tokens)


def test_pieces_are_one_text_wherever_they_are_cut(tmp_path, monkeypatch):
    """Also within a word, and where a line is long."""
    text = "the cat\nsat on the mat and\n" + "on and on and " * 9_000 + "on\n\na caté"
    for size in (3, 7, len(text)):
        examples = [text[i : i + size] for i in range(0, len(text), size)]
        (tmp_path / "all.txt").write_text(text)
        found = mock.Mock(return_value=iter(examples))
        found.name = "cut up"
        monkeypatch.setattr(tfds_text, "load", lambda data, found=found: {"train": found})
        (document,) = sources.tfds_examples(Config().data)["train"].documents()
        assert list(document) == list(read_lines(tmp_path / "all.txt"))


def test_examples_as_documents_each_end_in_eos(files, prepared):
    data = config(
        files, prepared, data__examples="documents", data__split_expressions=("train[:20]", "valid", "train[20:30]")
    ).data
    splits = sources.load(data)
    assert splits["train"].closed and splits["train"].name == "text_files/1.0.0/train[:20]"
    lines = (files / "train.txt").read_text().splitlines(keepends=True)
    assert ["".join(document) for document in splits["train"].documents()] == lines[:20]
    assert ["".join(document) for document in splits["test"].documents()] == lines[20:30]
    cache = corpus.cache_dir(data)
    tokenizer = tokenizers.train(data, splits["train"], cache)
    tokens = corpus.tokenise(splits["train"], tokenizer, cache).tokens
    assert np.count_nonzero(tokens == tokenizer.eos) == 20
    assert len(tokens) == sum(map(len, lines[:20])) + 20


def test_a_name_finds_its_prepared_version_in_the_folder_of_datasets(files, prepared):
    splits = sources.load(config(files, prepared.parent.parent, data__dataset="text_files").data)
    assert splits["valid"].name == "text_files/1.0.0/valid"
    assert sources.load(config(files, prepared, data__dataset="text_files:1.0.0").data)["valid"].name == splits["valid"].name


def test_training_and_scoring_from_it_equal_those_from_the_files(files, prepared, tmp_path):
    fields = dict(training__num_steps=3, training__evaluate_every_steps=3)
    found = []
    for name, source in (("tfds", config(files, prepared, **fields)), ("text", draft(files, **fields))):
        train(source, str(tmp_path / name))
        found.append(evaluate_run(open_run(str(tmp_path / name)), "test"))
    assert found[0]["nll_sum"] == found[1]["nll_sum"] and found[0]["text_sha256"] == found[1]["text_sha256"]


def test_what_cannot_be_read_is_told_at_once(files, prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    begun = time.perf_counter()
    for fields, parts in [
        (dict(data__path=None, data__dataset="lm1b"), ["'lm1b' is not prepared", "TensorFlow", "tfds build lm1b"]),
        (dict(data__path=None, data__dataset="tiny_shakespear"), ["'tiny_shakespear'", "did you mean 'tiny_shakespeare'"]),
        (dict(data__path=str(tmp_path)), [str(tmp_path), "dataset_info.json", "config.data.dataset"]),
        (dict(data__dataset="lm1b"), ["'lm1b'", "holds text_files/1.0.0", "one of them open"]),
        (dict(data__text_feature="label"), ["text_files/1.0.0 has the text features text", "'label'"]),
        (dict(data__split_expressions=("train", "nosuch", "test")), ["'nosuch'", "train, valid, test"]),
        (dict(data__split_expressions=("train", "valid", "test[:0]")), ["'test[:0]'"]),
    ]:
        with refused(*parts):
            sources.load(config(files, prepared, **fields).data)
    assert time.perf_counter() - begun < 30  # no waiting for a network
    with refused("is there already"):
        prepare_text_files({"train": files / "train.txt"}, prepared.parent.parent)


def test_damaged_files_are_told_and_never_read_as_text(files, prepared, tmp_path, monkeypatch):
    for number, (name, content) in enumerate([("dataset_info.json", "{"), ("dataset_info.json", "{}"), ("features.json", "?")]):
        broken = shutil.copytree(prepared, tmp_path / str(number) / "1.0.0")
        (broken / name).write_text(content)
        with refused("cannot be opened as a dataset", "prepare it anew"):
            sources.load(config(files, broken).data)
    broken = shutil.copytree(prepared, tmp_path / "shard" / "1.0.0")
    for path in broken.glob("*train*array_record*"):
        path.write_bytes(b"?" * len(path.read_bytes()))
    with refused("text_files/1.0.0/train cannot be read", "prepare it anew"):
        list(tfds_text.load(config(files, broken).data)["train"]())
    examples = tfds_text.load(config(files, prepared).data)["train"]
    monkeypatch.setattr(type(examples._source), "__getitems__", lambda self, indices: [{"text": None} for _ in indices])
    with refused("example 0 of text_files/1.0.0/train cannot be read"):  # as of a shard that was cut short
        list(examples())


def test_a_dataset_without_valid_says_how_to_cut_one(files, tmp_path):
    path = prepare_text_files({"train": files / "train.txt", "test": files / "test.txt"}, tmp_path)
    with refused("none for valid", "config.data.split_expressions", "train[90%:95%]"):
        sources.load(config(files, path).data)


def test_tensorflow_is_never_imported(prepared):
    import sys

    assert "tensorflow" not in sys.modules and os.path.isdir(pathlib.Path(prepared))
