"""lm.data.sources: the built-in corpus, text files and their splits, what identifies a text, and the texts that are refused."""

import gzip
import hashlib
import itertools
import pathlib
import random

import numpy as np
import pytest
from helpers import changed, refused
from hypothesis import given, settings, strategies as st

from lm.config import Config, resolve
from lm.data import sources, tokenizers
from lm.data.lines import lines_of, read_lines

SEPARATORS = "one\u2028two\x0bthree\x0cfour\x1cfive\x85six\rseven\n"  # str.splitlines would make seven lines of this one


def text_config(path, **fields):
    values = {"data__source": "text", "data__path": str(path), "data__tokenizer": "char"}
    return resolve(changed(Config(), **(values | fields))).data


def documents(split):
    return ["".join(lines) for lines in split.documents()]


def whole(split):
    return "".join(documents(split))


@pytest.fixture(scope="module")
def docs():
    return sources.load(resolve(Config()).data)


def test_python_docs_does_not_depend_on_the_order_of_the_file_system(docs, monkeypatch):
    listed = pathlib.Path.rglob
    monkeypatch.setattr(pathlib.Path, "rglob", lambda *args, **kwargs: reversed(list(listed(*args, **kwargs))))
    again = sources._python_documents.__wrapped__()
    assert sorted(again) == sorted(itertools.chain.from_iterable(map(documents, docs.values())))
    assert [body for split in ("test", "valid", "train") for body in documents(docs[split])] == list(again)


def test_python_docs_has_three_splits_of_whole_documents(docs):
    assert list(docs) == ["train", "valid", "test"]
    sizes = {name: split.size.num_bytes for name, split in docs.items()}
    for name in ("valid", "test"):
        largest = max(len(body.encode()) for body in documents(docs[name]))
        assert sum(sizes.values()) / 20 <= sizes[name] < sum(sizes.values()) / 20 + largest
        assert sizes[name] < 0.1 * sum(sizes.values())
    assert sum(sizes.values()) > 1_000_000
    for split in docs.values():
        assert split.closed
        for body in documents(split):
            assert body.endswith("\n") and not body.endswith("\n\n") and body.strip() and "\r\n" not in body and "\0" not in body


def test_no_paragraph_of_python_docs_stands_twice(docs):
    paragraphs = {
        name: [" ".join(part.split()) for body in documents(split) for part in body.split("\n\n") if part.strip()]
        for name, split in docs.items()
    }
    for one, other in itertools.combinations(paragraphs.values(), 2):
        assert not set(one) & set(other)
    assert len(set(paragraphs["train"])) == len(paragraphs["train"]) > 1000


def test_what_identifies_a_text_is_stable_and_distinguishes_splits(docs):
    again = sources.load(resolve(Config()).data)
    assert {name: split.size for name, split in again.items()} == {name: split.size for name, split in docs.items()}
    assert len({split.size.sha256 for split in docs.values()}) == 3
    text = whole(docs["valid"])
    assert docs["valid"].size.num_bytes == len(text.encode())
    assert docs["valid"].size.num_words == len(text.split())


def test_where_documents_end_is_part_of_what_identifies_a_text():
    def size(*bodies, closed=True):
        return sources.Split("made up", lambda: [[body] for body in bodies], closed).size

    assert size("a\n", "b\n").sha256 != size("a\nb\n").sha256
    assert size("a\n", "b\n", closed=False) == size("a\nb\n", closed=False)


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("train", "valid.txt.gz", "x.test.raw"),
    ],
)
def test_a_folder_of_three_files(names, tmp_path):
    texts = {"train": "the cat\n\nsat\n", "valid": "ü – \U0001f600\nno newline at the end", "test": SEPARATORS}
    for name, text in zip(names, texts.values(), strict=True):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    (tmp_path / "README.md").write_text("training a train")  # not a split
    (tmp_path / "train.json").write_text("{}")
    found = sources.load(text_config(tmp_path))
    assert {split: whole(found[split]) for split in found} == texts
    for split, text in texts.items():
        size = found[split].size
        assert (size.sha256, size.num_bytes) == (hashlib.sha256(text.encode()).hexdigest(), len(text.encode()))
        assert size.num_words == len(text.split())
        assert not found[split].closed and len(documents(found[split])) == 1


def test_the_hash_of_an_open_text_is_that_of_its_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("übermäßig\nlast line".encode())
    assert sources.text_file(tmp_path / "a.txt").size.sha256 == hashlib.sha256((tmp_path / "a.txt").read_bytes()).hexdigest()


@settings(deadline=None, max_examples=60)
@given(
    text=st.text(st.sampled_from("ab ü\U0001f600\n\r\u2028"), min_size=1, max_size=60).filter(lambda text: "\r\n" not in text),
    shares=st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20)),
)
def test_one_file_is_cut_at_exact_characters(text, shares, tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "all.txt"
    path.write_bytes(text.encode())
    fractions = tuple(share / sum(shares) for share in shares)
    found = sources.load(text_config(path, data__fractions=fractions))
    first, second = len(text) * shares[0] // sum(shares), len(text) * (shares[0] + shares[1]) // sum(shares)
    assert [whole(found[name]) for name in ("train", "valid", "test")] == [text[:first], text[first:second], text[second:]]


def test_one_file_is_split_90_5_5_when_nothing_is_said(tmp_path):
    text = "".join(f"{i:03}\n" for i in range(250))
    (tmp_path / "all.txt.gz").write_bytes(gzip.compress(text.encode()))
    found = sources.load(text_config(tmp_path / "all.txt.gz"))
    assert [whole(found[name]) for name in ("train", "valid", "test")] == [text[:900], text[900:950], text[950:]]


def test_a_very_long_line_stays_whole(tmp_path):
    """It is read in pieces."""
    lines = ["a b\n" * 100, "c " * 100_000 + "c\n", "d e\n" * 300, "f g\n" * 300]
    (tmp_path / "all.txt").write_text("".join(lines))
    found = sources.load(text_config(tmp_path / "all.txt", data__tokenizer="word", data__fractions=(0.6, 0.396, 0.004)))
    (train,), (valid,), (test,) = (["".join(document) for document in found[split].documents()] for split in sources.SPLITS)
    assert train == lines[0] + lines[1] and valid + test == lines[2] + lines[3] and len(test) > 400


def test_with_words_no_line_is_torn(tmp_path):
    lines = [f"{'word ' * (i % 5)}number {i}\n" for i in range(100)]
    (tmp_path / "all.txt").write_text("".join(lines))
    found = sources.load(text_config(tmp_path / "all.txt", data__tokenizer="word", data__fractions=(0.6, 0.25, 0.15)))
    parts = [list(itertools.chain.from_iterable(found[name].documents())) for name in ("train", "valid", "test")]
    assert [line for part in parts for line in part] == lines
    total = sum(map(len, lines))
    for share, before in ((0.6, parts[0]), (0.85, parts[0] + parts[1])):
        length = sum(map(len, before))
        assert length - len(before[-1]) < share * total <= length  # the first end of a line at or after the cut


def test_lines_end_at_newlines_only(tmp_path):
    text = SEPARATORS * 2 + "last"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert list(read_lines(tmp_path / "a.txt")) == [SEPARATORS, SEPARATORS, "last"]
    assert list(lines_of(text)) == [SEPARATORS, SEPARATORS, "last"]
    assert list(lines_of("a\r\nb\n")) == ["a\r\n", "b\n"]
    assert list(lines_of("")) == []


def test_a_very_long_line_comes_in_pieces_that_change_no_token(tmp_path, monkeypatch):
    monkeypatch.setattr("lm.data.lines._LONGEST", 64)
    draw = random.Random(0)
    words = "".join(draw.choices("ab ü", [6, 6, 3, 1], k=2000))
    text = f"{words}\nshort line\n{'ö' * 500}\n{words[:300]}"  # ö: nowhere to cut but between characters
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_lines(tmp_path / "a.txt"))
    assert "".join(pieces) == text and max(len(piece.encode()) for piece in pieces) < 2 * 64
    assert all(piece.endswith("\n") or piece[-1] not in " \n" for piece in pieces)
    for name, fields in (("subword", dict(data__vocab_size=260)), ("word", {}), ("char", {}), ("byte", {})):
        data = text_config(tmp_path / "a.txt", data__tokenizer=name, **fields)
        tokenizer = tokenizers.train(data, sources.Split("whole", lambda: [[text]]), tmp_path)
        lines = text.splitlines(keepends=True)
        if name in ("subword", "word"):  # a word that is longer than a piece is all that a cut may change
            lines, pieces = lines[:2], list(itertools.takewhile(lambda piece: "ö" not in piece, pieces))
        whole_ids = np.concatenate(list(tokenizer.encode_lines(lines)))
        np.testing.assert_array_equal(np.concatenate(list(tokenizer.encode_lines(pieces))), whole_ids, err_msg=name)
        pieces = list(read_lines(tmp_path / "a.txt"))


@pytest.mark.parametrize("character", ["x", "é", "€", "😀"])
@pytest.mark.parametrize("shift", range(4))
def test_a_long_line_without_spaces_is_cut_between_characters_of_any_width(character, shift, tmp_path, monkeypatch):
    monkeypatch.setattr("lm.data.lines._LONGEST", 64)
    text = "a" * shift + character * 200
    (tmp_path / "a.txt").write_text(text)
    assert "".join(read_lines(tmp_path / "a.txt")) == text


BAD = {
    "long.txt": (b"\x80" * 200_000, ["not UTF-8", "0x80", "line 1, column 1", "iconv"]),
    "empty.txt": (b"", ["is empty"]),
    "binary.txt": (b"fine\n\x00\x01\n", ["binary", "line 2", "UTF-8 is needed"]),
    "latin.txt": ("fine\ngut für\n".encode("latin-1"), ["not UTF-8", "0xfc", "line 2, column 6", "iconv"]),
    "half.txt": ("fine\nü".encode()[:-1], ["not UTF-8", "line 2, column 1", "iconv"]),
    "crlf.txt": (b"one\ntwo\r\n", ["CRLF", "line 2", "sed"]),
    "bom.txt": (b"\xef\xbb\xbfone\n", ["byte order mark", "remove it", "sed"]),
    "not.txt.gz": (b"plain text\n", ["cannot be read"]),
    "cut.txt.gz": (gzip.compress(b"some text\n" * 100)[:-12], ["cannot be read"]),
    "damaged.txt.gz": (gzip.compress(b"")[:10] + b"\x55" * 40, ["cannot be read"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_text_is_named_with_what_to_do(name, tmp_path):
    content, parts = BAD[name]
    (tmp_path / name).write_bytes(content)
    with refused(str(tmp_path / name), *parts):
        sources.text_file(tmp_path / name).size  # noqa: B018  (reading happens here)
    with refused(str(tmp_path / name), *parts):
        for split in sources.load(text_config(tmp_path / name)).values():
            whole(split)


def test_what_cannot_be_read_is_a_sentence_or_passed_over(tmp_path, monkeypatch):
    assert list(sources._docstrings(tmp_path / "a link to nowhere.py")) == []

    def closed(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "iterdir", closed)
    with refused(f"config.data.path '{tmp_path}' cannot be read: Permission denied"):
        sources.load(text_config(tmp_path))


def test_a_path_that_is_not_there_or_holds_no_splits(tmp_path):
    with refused(f"config.data.path '{tmp_path / 'nowhere'}' does not exist", "give a folder"):
        sources.load(text_config(tmp_path / "nowhere"))
    with refused("does not exist"):
        sources.load(text_config("x" * 5000))
    with refused(f"config.data.path '{tmp_path}' must hold one train file", "train.txt", "there is none"):
        sources.load(text_config(tmp_path))
    for name in ("train.txt", "valid.txt", "valid.txt.gz"):
        (tmp_path / name).write_text("text\n")
    with refused("must hold one valid file", "there are 2 such files: valid.txt, valid.txt.gz"):
        sources.load(text_config(tmp_path))
    (tmp_path / "valid.txt.gz").unlink()
    with refused("must hold one test file", "there is none"):
        sources.load(text_config(tmp_path))
    (tmp_path / "test.txt").mkdir()
    with refused(str(tmp_path / "test.txt"), "cannot be read", "directory"):
        whole(sources.load(text_config(tmp_path))["test"])
    with refused("config.data.fractions is set", str(tmp_path), "its own splits"):
        sources.load(text_config(tmp_path, data__fractions=(0.8, 0.1, 0.1)))
