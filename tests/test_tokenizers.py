"""lm.data.tokenizers: text comes back from ids, vocabularies come from train alone, and hashes tell tokenizers apart."""

import json
import random

import numpy as np
import pytest
from helpers import WORDS, changed, refused
from hypothesis import given, settings, strategies as st

from lm.config import Config, resolve
from lm.data import sources, tokenizers
from lm.data.lines import lines_of
from lm.data.tokenizers import ByteTokenizer, CharTokenizer, SubwordTokenizer, WordTokenizer, encode

TRAINING = ("the cat sat on the mat – über, naïve\n" + " ".join(WORDS) + "\n\n\tdef f(x):  return x + 1\n") * 20
# A str of any scalar values, with lines, blanks, controls and what a tokenizer may take for its own
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            [
                "\n",
                "\n\n",
                "  ",
                "\r",
                "\r\n",
                "\x00",
                "\u2028",
                "\x1c",
                "<eos>",
                "<unk>",
                "the cat",
                "\U0001f600",
                "é",
                "e\u0301",
            ]
        ),
    ),
    max_size=8,
).map("".join)


def split_of(*documents, name="train"):
    return sources.Split(name, lambda: [lines_of(document) for document in documents])


def train(kind, *documents, cache=None, **fields):
    data = resolve(changed(Config(), data__tokenizer=kind, **{f"data__{name}": value for name, value in fields.items()})).data
    if cache is not None:
        return tokenizers.train(data, split_of(*documents), cache)
    return tokenizers._KINDS[kind].train(data, split_of(*documents))


@pytest.fixture(scope="module")
def subword():
    return train("subword", TRAINING, vocab_size=300)


def check_round_trip(tokenizer, text):
    ids = encode(tokenizer, text, strict=True)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32 and not np.any(ids == tokenizer.eos) and np.all(ids < tokenizer.vocab_size)
    lines = list(tokenizer.encode_lines(lines_of(text)))
    assert len(lines) == len(list(lines_of(text)))
    np.testing.assert_array_equal(np.concatenate([*lines, np.zeros(0, int)]), ids)
    for line, part in zip(lines_of(text), lines, strict=True):  # no line depends on another
        np.testing.assert_array_equal(encode(tokenizer, line), part)


@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
def test_bytes_come_back_exactly(text):
    tokenizer = ByteTokenizer()
    check_round_trip(tokenizer, text)
    assert bytes(encode(tokenizer, text).astype(np.uint8)) == text.encode()


@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
def test_subwords_come_back_exactly(subword, text):
    check_round_trip(subword, text)


@settings(deadline=None, max_examples=100)
@given(text=TEXTS.filter(bool))
def test_known_characters_come_back_exactly(text):
    tokenizer = train("char", text)
    check_round_trip(tokenizer, text)
    assert len(encode(tokenizer, text)) == len(text)
    assert tokenizer.vocab_size == len(set(text)) + 2
    assert tokenizer.symbols[2:] == sorted(set(text))


SPACED = st.text(st.sampled_from([*" \t\n\x0b\x0c\r\x1c\x1f\x85\xa0\u2003\u2028\u3000\ufeff", *"aübt'sre,.-1²", "日", "\u0301"]))


@pytest.fixture(scope="module")
def blanks():
    """A subword tokenizer that has merged white space of all kinds."""
    draw = random.Random(0)
    return train(
        "subword", "".join(draw.choices(" \t\n\x0b\x1c\xa0\u3000a", weights=[9, 2, 1, 1, 1, 1, 1, 2], k=20_000)), vocab_size=400
    )


@settings(deadline=None, max_examples=1000)
@given(SPACED, SPACED)
def test_subwords_of_a_line_are_those_of_the_library(blanks, text, after):
    """Though each word is asked for once, and of those before a part is forgotten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SubwordTokenizer, "_most_known", 3)
        for line in (text, f"{text} {after}"):
            assert next(blanks.encode_lines([line])).tolist() == blanks._model.encode(line).ids


def test_a_tokenizer_that_splits_words_in_another_way_is_refused(subword, tmp_path):
    saved = subword.to_json()
    saved["model"]["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "other.json").write_text(json.dumps(saved))
    with refused("is not a tokenizer of this project: it splits words in a way of its own"):
        tokenizers.load(tmp_path / "other.json")


@pytest.mark.parametrize("text", ["<eos>", "a <eos> b", "<unk><eos>\n"])
def test_a_text_cannot_spell_the_end_of_a_document(text, subword):
    for tokenizer in (ByteTokenizer(), train("char", text), subword):
        assert tokenizer.eos not in encode(tokenizer, text) and tokenizer.decode(encode(tokenizer, text)) == text
        with_end = np.append(encode(tokenizer, text), tokenizer.eos)
        assert tokenizer.decode(with_end) == text


def test_merged_subwords_cross_no_newline(subword):
    assert len(encode(subword, TRAINING)) < 0.6 * len(TRAINING.encode())
    for i in range(subword.vocab_size):
        assert "\n" not in subword.decode([i]) or subword.decode([i]).endswith("\n")


def test_partial_characters_do_not_break_decoding(subword):
    for tokenizer in (ByteTokenizer(), subword):
        ids = encode(tokenizer, "\U0001f600")
        assert len(ids) == 4 and tokenizer.decode(ids[:2]).startswith("\ufffd")


def test_the_words_of_train_in_the_order_of_their_counts():
    tokenizer = train("word", "b b b a a\nc c\nd\n", "a <unk> <eos>\n")
    assert tokenizer.symbols == ["<eos>", "<unk>", "a", "b", "c", "d"]  # a and b are level: by name
    np.testing.assert_array_equal(encode(tokenizer, "a d\n\nx  c\n"), [2, 5, 0, 0, 1, 4, 0])
    np.testing.assert_array_equal(encode(tokenizer, "a b"), [2, 3])  # no newline, no eos: a prompt
    assert train("word", "b b b a a\nc c\nd\n", min_count=2).symbols == ["<eos>", "<unk>", "b", "a", "c"]
    assert train("word", "b b b a a\nc c\nd\n", vocab_size=4).symbols == ["<eos>", "<unk>", "b", "a"]
    assert train("word", "b b b a a\nc c\nd\n", vocab_size=100).symbols == ["<eos>", "<unk>", "b", "a", "c", "d"]


def test_the_unk_of_the_data_is_the_unk_of_the_vocabulary():
    tokenizer = train("word", "the <unk> sat\n<unk>\n")
    assert tokenizer.symbols.count("<unk>") == 1
    np.testing.assert_array_equal(encode(tokenizer, "<unk>"), encode(tokenizer, "never_seen"))
    np.testing.assert_array_equal(encode(tokenizer, "<unk>", strict=True), [tokenizer.unk])


@settings(deadline=None, max_examples=60)
@given(lines=st.lists(st.lists(st.sampled_from(WORDS), max_size=4), max_size=6), closed=st.booleans())
def test_known_words_come_back_but_for_their_spacing(lines, closed):
    tokenizer = WordTokenizer(["<eos>", "<unk>", *WORDS])
    text = "\n".join(" ".join(line) for line in lines) + ("\n" if closed else "")
    ids = encode(tokenizer, text, strict=True)
    assert tokenizer.decode(ids) == text
    np.testing.assert_array_equal(encode(tokenizer, text.replace(" ", " \t  ")), ids)
    assert np.sum(ids == tokenizer.eos) == text.count("\n")


def test_an_unknown_symbol_is_unk_or_refused():
    char, word = CharTokenizer(["<eos>", "<unk>", "a", "b"]), WordTokenizer(["<eos>", "<unk>", "a", "b"])
    for tokenizer, text in ((char, "azb"), (word, "a z b")):
        np.testing.assert_array_equal(encode(tokenizer, text), [2, 1, 3])
        with refused("'z' is not in the vocabulary", f"{tokenizer.name} tokenizer", "4 entries"):
            encode(tokenizer, text, strict=True)
    assert char.decode([2, 1, 3]) == "a<unk>b"


def every_kind():
    return {
        "byte": ByteTokenizer(),
        "char": train("char", TRAINING),
        "char of another text": train("char", "abc"),
        "word": train("word", TRAINING),
        "word, frequent": train("word", TRAINING, min_count=30),
        "subword": train("subword", TRAINING, vocab_size=300),
        "subword, smaller": train("subword", TRAINING, vocab_size=280),
        "subword of another text": train("subword", TRAINING[::-1], vocab_size=300),
    }


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path):
    hashes = {}
    for name, tokenizer in every_kind().items():
        path = tmp_path / f"{name}.json"
        tokenizers.save(tokenizer, path)
        back = tokenizers.load(path)
        assert type(back) is type(tokenizer)
        assert (back.vocab_size, back.eos, back.ends_lines) == (tokenizer.vocab_size, tokenizer.eos, tokenizer.ends_lines)
        text = "the cat – über naïve\nxyzzy \U0001f600\n"
        np.testing.assert_array_equal(encode(back, text), encode(tokenizer, text))
        assert back.decode(encode(back, text)) == tokenizer.decode(encode(tokenizer, text))
        assert tokenizers.sha256(back) == tokenizers.sha256(tokenizer)
        hashes[name] = tokenizers.sha256(tokenizer)
    assert len(set(hashes.values())) == len(hashes)  # and different ones differ
    assert hashes == {name: tokenizers.sha256(tokenizer) for name, tokenizer in every_kind().items()}  # training is deterministic


def test_a_file_that_is_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    with refused(str(path), "does not exist"):
        tokenizers.load(path)
    for content in ("", "{}", "[]", '{"name": "nosuch"}', '{"name": "subword", "model": {}}', '{"name": "char"}', "\x00\x01"):
        path.write_text(content)
        with refused(str(path), "is not a tokenizer of this project"):
            tokenizers.load(path)


def test_subword_sizes_are_exact_and_too_little_text_is_refused(subword):
    assert subword.vocab_size == 300 and subword.eos == 299
    with refused("config.data.vocab_size is 5000", "train holds too little text", "at most that"):
        train("subword", TRAINING, vocab_size=5000)
    with refused("train holds too little text for subwords", "byte or char"):
        train("subword", "a\n", vocab_size=300)


def test_a_text_without_spaces_is_not_kept(subword):
    """Its words are whole lines."""
    lines = [f"{number}" * 30 for number in range(100, 120)] + ["short words are kept"]
    before = len(subword._known)
    found = [ids.tolist() for ids in subword.encode_lines(lines * 2)]
    assert found[: len(lines)] == found[len(lines) :] and len(subword._known) <= before + 4
    assert found[0] == next(iter(subword.encode_lines([lines[0] + " " + lines[0]]))).tolist()[: len(found[0])]


def test_training_is_kept_in_the_cache_by_content(tmp_path):
    kinds = tokenizers._KINDS
    first = train("subword", TRAINING, cache=tmp_path, vocab_size=300)
    (path,) = tmp_path.iterdir()
    assert tokenizers.sha256(tokenizers.load(path)) == tokenizers.sha256(first)

    written, content = path.stat(), path.read_text()
    train("subword", TRAINING, cache=tmp_path, vocab_size=300)
    assert path.stat().st_mtime_ns == written.st_mtime_ns  # read, not made again

    saved = json.loads(content)
    saved["model"]["model"]["merges"].pop()
    for damaged in ("{damaged", json.dumps(saved)):
        path.write_text(damaged)
        again = train("subword", TRAINING, cache=tmp_path, vocab_size=300)
        assert tokenizers.sha256(again) == tokenizers.sha256(first)
        assert isinstance(tokenizers.load(path), kinds["subword"]) and path.read_text() == content

    train("subword", TRAINING + "more\n", cache=tmp_path, vocab_size=300)
    train("subword", TRAINING, cache=tmp_path, vocab_size=290)
    train("word", TRAINING, cache=tmp_path, min_count=2)
    train("word", TRAINING, cache=tmp_path, min_count=3)
    assert len(list(tmp_path.iterdir())) == 5
    assert train("byte", TRAINING, cache=tmp_path).name == "byte" and train("char", TRAINING, cache=tmp_path).name == "char"


def test_the_vocabulary_is_that_of_train_alone(tmp_path):
    (tmp_path / "train.txt").write_text("aaa bbb\n")
    (tmp_path / "valid.txt").write_text("aaa ccc\n")
    (tmp_path / "test.txt").write_text("aaa ddd\n")
    from lm.training.train import prepare

    for kind, known in (("word", ["aaa", "bbb"]), ("char", ["\n", " ", "a", "b"])):
        draft = changed(
            Config(),
            data__source="text",
            data__path=str(tmp_path),
            data__tokenizer=kind,
            data__cache_dir=str(tmp_path / "cache"),
            model__architecture="ngram",
        )
        assert prepare(draft).tokenizer.symbols == ["<eos>", "<unk>", *known]
