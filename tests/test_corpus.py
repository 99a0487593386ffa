"""lm.data.corpus: how many tokens a text has, the cache on disk, and what happens when it is damaged or cannot be written."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers import changed, corpus_of, refused

from lm.config import Config
from lm.data import corpus, sources
from lm.data.corpus import Corpus, tokenise
from lm.data.lines import lines_of
from lm.data.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer

WORD = WordTokenizer(["<eos>", "<unk>", "a", "b"])
CHAR = CharTokenizer(["<eos>", "<unk>", "\n", " ", "a", "b"])
BYTE = ByteTokenizer()


def open_text(text):
    return sources.Split("open", lambda: [lines_of(text)])


def closed(*documents):
    return sources.Split("closed", lambda: [lines_of(document) for document in documents], closed=True)


@pytest.mark.parametrize(
    "split, tokenizer, tokens",
    [
        # documents: one eos each, whatever the tokenizer counts in, also for one that is empty
        (closed("b", "", "a"), WORD, [3, 0, 0, 2, 0]),
        (closed("b", "", "a"), CHAR, [5, 0, 0, 4, 0]),
        (closed("ab\n", "\n", "b"), CHAR, [4, 5, 2, 0, 2, 0, 5, 0]),
        (closed("ab\n", "\n", "b"), BYTE, [97, 98, 10, 256, 10, 256, 98, 256]),
        # lines: one eos each, for blank ones too, and for a last one without its newline
        (open_text("a b\n\nb\n"), WORD, [2, 3, 0, 0, 3, 0]),
        (open_text("a b\n\nb"), WORD, [2, 3, 0, 0, 3, 0]),
        (open_text("a zzz\n"), WORD, [2, 1, 0]),
        (closed("a b\n", "b\na"), WORD, [2, 3, 0, 3, 0, 2, 0]),
        # one open text: its characters or bytes and nothing else
        (open_text("ab\n\nb"), CHAR, [4, 5, 2, 2, 5]),
        (open_text("ü\n"), CHAR, [1, 2]),
        (open_text("ü\n"), BYTE, [0xC3, 0xBC, 10]),
    ],
)
def test_the_tokens_of_a_text(split, tokenizer, tokens, tmp_path):
    found = tokenise(split, tokenizer, tmp_path)
    np.testing.assert_array_equal(found.tokens, tokens)
    assert found.size == split.size and found.name == split.name
    assert (found.vocab_size, found.eos) == (tokenizer.vocab_size, tokenizer.eos)


def test_tokens_are_read_through_memory_mapping_and_made_once(tmp_path, monkeypatch):
    split = open_text("ab " * 1000)
    first = tokenise(split, CHAR, tmp_path)
    assert isinstance(first.tokens, np.memmap) and first.tokens.dtype == np.uint16 and not first.tokens.flags.writeable
    monkeypatch.setattr(corpus, "_make", lambda *_: pytest.fail("the cache was not used"))
    np.testing.assert_array_equal(tokenise(split, CHAR, tmp_path).tokens, first.tokens)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_big_vocabularies_take_more_bytes(tmp_path):
    symbols = ["<eos>", "<unk>", *map(str, range(70_000))]
    found = tokenise(open_text("69999 0 65535\n"), WordTokenizer(symbols), tmp_path)
    np.testing.assert_array_equal(found.tokens, [70_001, 2, 65_537, 0])
    assert [corpus.token_type(size).name for size in (1 << 16, (1 << 16) + 1)] == ["uint16", "int32"]


def test_each_text_and_tokenizer_has_a_place_of_its_own(tmp_path):
    other = CharTokenizer(["<eos>", "<unk>", "\n", " ", "b", "a"])
    for split, tokenizer in (
        (open_text("ab"), CHAR),
        (open_text("ab"), other),
        (open_text("ab"), BYTE),
        (open_text("ba"), CHAR),
        (closed("ab"), CHAR),
        (closed("a", "b"), CHAR),
    ):
        found = tokenise(split, tokenizer, tmp_path)
        assert tokenizer.decode(found.tokens) == "".join("".join(lines) for lines in split.documents())
    assert len(list(tmp_path.iterdir())) == 6


def damage(folder, how):
    tokens, manifest = folder / "tokens.bin", folder / "manifest.json"
    content = tokens.read_bytes()
    if how == "truncated":
        tokens.write_bytes(content[:-2])
    elif how == "flipped byte":
        tokens.write_bytes(content[:6] + bytes([content[6] ^ 1]) + content[7:])
    elif how == "no tokens":
        tokens.unlink()
    elif how == "no manifest":
        manifest.unlink()
    elif how == "cut manifest":
        manifest.write_text(manifest.read_text()[:20])
    elif how == "empty manifest":
        manifest.write_text("{}")
    elif how == "odd manifest":
        manifest.write_text("[1]")
    elif how == "half made":
        content = tokens.read_bytes()
        for path in (tokens, manifest):
            path.unlink()
        folder.rmdir()
        half = folder.with_name(f".{folder.name}.abcdef")
        half.mkdir()
        (half / "tokens.bin").write_bytes(content[:4])


@pytest.mark.parametrize(
    "how",
    ["truncated", "flipped byte", "no tokens", "no manifest", "cut manifest", "empty manifest", "odd manifest", "half made"],
)
def test_a_damaged_copy_is_made_again(how, tmp_path):
    split = open_text("abba\n" * 10)
    expected = np.array(tokenise(split, CHAR, tmp_path).tokens)
    (folder,) = tmp_path.iterdir()
    damage(folder, how)
    np.testing.assert_array_equal(tokenise(split, CHAR, tmp_path).tokens, expected)
    assert json.loads((folder / "manifest.json").read_text())["tokens"] == len(expected)
    np.testing.assert_array_equal(np.fromfile(folder / "tokens.bin", np.uint16), expected)


def test_a_copy_that_another_process_has_just_finished_stays(tmp_path, monkeypatch):
    split, make = open_text("abba\n"), corpus.token_ids

    def overtaken(read, tokenizer):
        monkeypatch.setattr(corpus, "token_ids", make)
        tokenise(split, tokenizer, tmp_path)
        (theirs,) = tmp_path.glob("tokens-*/tokens.bin")
        written.append(theirs.stat())
        return make(read, tokenizer)

    written = []
    monkeypatch.setattr(corpus, "token_ids", overtaken)
    assert len(tokenise(split, CHAR, tmp_path).tokens) == 5
    (folder,) = tmp_path.iterdir()
    assert (folder / "tokens.bin").stat().st_ino == written[0].st_ino


def test_something_else_in_the_place_of_a_copy(tmp_path):
    tokenise(open_text("abba\n"), CHAR, tmp_path)
    (folder,) = tmp_path.iterdir()
    shutil.rmtree(folder)
    folder.write_text("not a folder")
    with refused(str(folder), "cannot be read back", "remove it"):
        tokenise(open_text("abba\n"), CHAR, tmp_path)


def test_a_text_that_breaks_off_leaves_no_copy(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"ab\nab\n")
    split = sources.text_file(tmp_path / "text.txt")
    assert split.size.num_bytes == 6
    (tmp_path / "text.txt").write_bytes(b"ab\n\xff\n")  # changed on disk between two passes
    with refused("not UTF-8", "line 2"):
        tokenise(split, CHAR, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("closed", [False, True])
def test_a_text_that_changes_while_it_is_read_leaves_no_copy(closed, tmp_path):
    """Or its tokens would be found as those of the text that was there before."""
    (tmp_path / "text.txt").write_text("ab\nab\n")
    split = dataclasses.replace(sources.text_file(tmp_path / "text.txt"), closed=closed)
    assert split.size.num_bytes == 6
    (tmp_path / "text.txt").write_text("ab\nbb\n")
    cache = tmp_path / "cache"
    cache.mkdir()
    with refused("text.txt was changed while it was read"):
        tokenise(split, CHAR, cache)
    assert not list(cache.iterdir())
    (tmp_path / "text.txt").write_text("ab\nab\n")
    assert len(tokenise(split, CHAR, cache).tokens) == 6 + closed


def test_ids_beyond_the_vocabulary_are_refused():
    with refused("made up holds token id 7", "the vocabulary ends at 6"):
        corpus_of([1, 7, 2], vocab_size=7)
    with refused("made up holds token id -1"):
        corpus_of([1, -1, 2], vocab_size=7)
    assert isinstance(corpus_of([0, 6], vocab_size=7), Corpus)
    with refused("made up holds no text"):
        corpus_of([], vocab_size=7)


def test_a_cache_is_for_all_who_share_its_folder(tmp_path):
    tokenise(open_text("ab"), CHAR, tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o755


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    for place in (in_the_way, in_the_way / "inside"):
        with refused(f"the token cache {place} cannot be written", "config.data.cache_dir"):
            corpus.cache_dir(changed(Config(), data__cache_dir=str(place)).data)
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    with refused(f"the token cache {in_the_way / 'lm'} cannot be written", "config.data.cache_dir"):
        corpus.cache_dir(Config().data)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert corpus.cache_dir(Config().data) == tmp_path / "home" / "lm"
    assert (tmp_path / "home" / "lm").is_dir()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus.os, "fsync", full)
    with refused("cannot be written", "No space left on device"):
        tokenise(open_text("ab"), CHAR, tmp_path / "home" / "lm")
    assert list((tmp_path / "home" / "lm").iterdir()) == []
