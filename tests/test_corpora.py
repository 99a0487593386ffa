"""The published counts of real corpora. LM_TEST_CORPORA names a folder with ptb, wikitext-2 and tinyshakespeare."""

import os
import pathlib

import numpy as np
import pytest
from helpers import ROOT, changed

from lm.config import Config, resolve
from lm.data import sources, tokenizers
from lm.data.corpus import tokenise

FOLDER = pathlib.Path(os.environ.get("LM_TEST_CORPORA") or ROOT.parent / "shared" / "data")


def prepared(name, tokenizer, cache):
    """The tokenizer and the three tokenised splits of a corpus."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{path} is not there; LM_TEST_CORPORA can name a folder with ptb, wikitext-2 and tinyshakespeare")
    data = resolve(changed(Config(), data__source="text", data__path=str(path), data__tokenizer=tokenizer)).data
    splits = sources.load(data)
    trained = tokenizers.train(data, splits["train"], cache)
    return trained, {name: tokenise(split, trained, cache) for name, split in splits.items()}


def lengths(found):
    return tuple(len(found[name].tokens) for name in ("train", "valid", "test"))


def test_penn_treebank_by_words(tmp_path):
    tokenizer, found = prepared("ptb", "word", tmp_path)
    assert lengths(found) == (929_589, 73_760, 82_430)
    assert tokenizer.vocab_size == 10_000
    for split, corpus in found.items():
        lines = (FOLDER / "ptb" / f"ptb.{split}.txt").read_text().count("\n")
        assert np.count_nonzero(corpus.tokens == tokenizer.eos) == lines
        assert corpus.size.num_words == len(corpus.tokens) - lines
    assert tokenizer.decode(found["valid"].tokens[:24]).startswith("consumers may want to move their telephones")


def test_wikitext_2_by_words(tmp_path):
    tokenizer, found = prepared("wikitext-2", "word", tmp_path)
    assert lengths(found) == (2_088_628, 217_646, 245_569)
    assert tokenizer.vocab_size == 33_278
    for corpus in found.values():
        assert corpus.tokens.max() < 33_278
    # valid and test were made with the vocabulary of train: what they do not know stands there as <unk> already
    text = (FOLDER / "wikitext-2" / "valid.txt").read_text().split()
    assert np.count_nonzero(found["valid"].tokens == tokenizer.unk) == text.count("<unk>")


def test_tiny_shakespeare_by_characters(tmp_path):
    tokenizer, found = prepared("tinyshakespeare/input.txt", "char", tmp_path)
    assert lengths(found) == (1_003_854, 55_770, 55_770)
    assert tokenizer.vocab_size == 65 + 2
    text = (FOLDER / "tinyshakespeare" / "input.txt").read_text()
    assert "".join(tokenizer.decode(found[name].tokens) for name in ("train", "valid", "test")) == text
    assert all(tokenizer.eos not in corpus.tokens and tokenizer.unk not in corpus.tokens for corpus in found.values())
