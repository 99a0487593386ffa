"""Whatever is on disk or on the command line: the right result or one clear sentence, and what was written comes back exactly.

The suite tries a hundred inputs of each kind; FUZZ_INPUTS=10000 python -m pytest tests/test_fuzz.py tries so many.
"""

import contextlib
import dataclasses
import functools
import gzip
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from helpers import WorkersHere, changed, config_file, draft, untrained_run, write_corpus
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from launch.command import load_config
from lm.config import Config, Section, from_json, resolve, to_json
from lm.data import corpus, prepare as prepare_module, shards, sources, tokenizers
from lm.data.lines import cuts, lines_of, read_lines
from lm.data.prepare import Job, prepare
from lm.errors import UserError
from lm.evaluation.evaluate import evaluate_run
from lm.reporting.runs import read_run
from lm.runs.folder import RunFolder
from lm.runs.open import open_run

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_INPUTS", "100")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TEXT = st.text(st.characters(exclude_characters="\0\r", exclude_categories=("Cs",)), max_size=60)
BYTES = (
    st.binary(max_size=80)
    | TEXT.map(str.encode)
    | st.lists(st.sampled_from([b"a", b" ", b"\n", b"\r\n", b"\xc3\xbc", b"\xc3", b"\0"])).map(b"".join)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(allow_nan=False) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.sampled_from(["name", "symbols", "model"]), inner, max_size=3)
    ),
    max_leaves=8,
)
SCRATCH = pathlib.Path(tempfile.mkdtemp())


@pytest.fixture(scope="module", autouse=True)
def scratch():
    yield
    shutil.rmtree(SCRATCH, ignore_errors=True)


@contextlib.contextmanager
def sentence_at_most():
    """The body may raise one clear sentence, and nothing else."""
    try:
        yield
    except UserError as error:
        told = str(error)
        assert told and "\n" not in told and "Traceback" not in told and len(told) < 2000, told


@st.composite
def damages(draw):
    """What can happen to the bytes of a file: a function from bytes to other bytes."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "replace", "nothing left"]))
    where, other = draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=8))

    def apply(content):
        at = int(where * len(content))
        if kind == "flip":
            return content[:at] + bytes([content[at] ^ (other[0] or 1)]) + content[at + 1 :]
        if kind == "cut":
            return content[:at]
        if kind == "insert":
            return content[:at] + other + content[at:]
        return other if kind == "replace" else b""

    return apply


# Text


@fuzz
@given(BYTES, st.integers(1, 30))
def test_text_readers(content, num_bytes):
    plain, zipped = SCRATCH / "text.txt", SCRATCH / "text.txt.gz"
    plain.write_bytes(content)
    zipped.write_bytes(gzip.compress(content, 1))
    found = {}
    for path in (plain, zipped):
        with sentence_at_most():
            found[path] = list(read_lines(path))
            assert "".join(found[path]).encode() == content
            assert all(line.endswith("\n") and line.count("\n") == 1 for line in found[path][:-1])
    assert found.get(plain) == found.get(zipped)
    with sentence_at_most():
        parts = list(cuts(plain, num_bytes))
        assert [line for part in parts for line in read_lines(plain, *part)] == found[plain]


@fuzz
@given(damages())
def test_a_damaged_gz(damage):
    path, content = SCRATCH / "damaged.txt.gz", ("some text\n" * 20).encode()
    path.write_bytes(damage(gzip.compress(content)))
    with sentence_at_most():
        list(read_lines(path))


# Tokenizers


@functools.cache
def trained(name):
    path = write_corpus(SCRATCH / "tokenizers")
    data = resolve(changed(draft(path, data__tokenizer=name), **({"data__vocab_size": 280} if name == "subword" else {}))).data
    return tokenizers.fit(data, sources.load(data)["train"])


@fuzz
@given(TEXT)
def test_tokenizers_give_back_what_they_were_given(text):
    for name in ("byte", "subword"):
        tokenizer = trained(name)
        ids = tokenizers.encode(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size and tokenizer.eos not in ids)
    known = trained("char").symbols
    ids = tokenizers.encode(trained("char"), text)
    assert [known[i] for i in ids] == [symbol if symbol in known else "<unk>" for symbol in text]
    words = tokenizers.encode(trained("word"), text)
    assert sum(words == trained("word").eos) == text.count("\n") + text.split().count("<eos>")


WORDS_AND_ENDS = st.lists(st.sampled_from(["the", "cat", "on", "\n"]), max_size=20)


@fuzz
@given(WORDS_AND_ENDS)
def test_words_of_the_vocabulary_come_back(words):
    text = " ".join(words).replace(" \n ", "\n").replace(" \n", "\n").replace("\n ", "\n")
    assert trained("word").decode(tokenizers.encode(trained("word"), text)) == text


@fuzz
@given(JSON, damages(), st.sampled_from(["byte", "char", "word", "subword"]), st.booleans())
def test_tokenizer_files(value, damage, name, is_json):
    path = SCRATCH / "tokenizer.json"
    if is_json:
        path.write_text(json.dumps(value))
    else:
        tokenizers.save(trained(name), path)
        path.write_bytes(damage(path.read_bytes()))
    with sentence_at_most():
        found = tokenizers.load(path)
        ids = tokenizers.encode(found, "the cat\n")
        assert len(ids) == 0 or ids.max() < found.vocab_size


# Configs


def fields():
    for section in (Config(), *(value for value in vars(Config()).values() if isinstance(value, Section))):
        prefix = f"{type(section)._section}." if type(section)._section else ""
        for field in dataclasses.fields(section):
            yield prefix + field.name, field


NAMES = [name for name, _ in fields()]
CHOICES = sorted({choice for _, field in fields() for choice in (field.metadata.get("choices") or ()) if isinstance(choice, str)})
VALUES = st.one_of(
    TEXT,
    st.integers(-(2**70), 2**70).map(str),
    st.integers(0, 5).map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            *CHOICES,
            "none",
            "True",
            "false",
            "(1, 2)",
            "(0.5, 0.5)",
            "('a', 'b')",
            "[1]",
            "()",
            "((1,),)",
            "1e999",
            "0x10",
            "lambda: 0",
        ]
    ),
)
OVERRIDES = st.lists(st.tuples(st.sampled_from(NAMES) | TEXT, VALUES), min_size=1, max_size=3)


@functools.cache
def lstm_file():
    return str(config_file(SCRATCH / "config.py", draft(SCRATCH)))


@fuzz
@given(OVERRIDES)
def test_config_overrides(overrides):
    with sentence_at_most():
        config = load_config(lstm_file(), [f"--config.{name}={value}" for name, value in overrides])
        assert from_json(json.loads(json.dumps(to_json(config)))) == config
        resolved = resolve(config)
        assert from_json(json.loads(json.dumps(to_json(resolved)))) == from_json(to_json(resolved))


@fuzz
@given(
    st.dictionaries(st.sampled_from([name.split(".")[0] for name in NAMES]) | TEXT, JSON, max_size=3), damages(), st.booleans()
)
def test_config_files_of_runs(value, damage, is_json):
    folder = SCRATCH / "run of a config"
    folder.mkdir(exist_ok=True)
    whole = {"given": to_json(draft(SCRATCH)), "resolved": to_json(resolve(draft(SCRATCH)))}
    text = json.dumps({"given": value, "resolved": value} if is_json else whole)
    (folder / "config.json").write_bytes(text.encode() if is_json else damage(text.encode()))
    with sentence_at_most():
        RunFolder(str(folder)).read_config()


# Caches and prepared tokens


@fuzz
@given(damages(), st.sampled_from(["tokens.bin", "manifest.json"]))
def test_the_token_cache_never_gives_other_tokens(damage, name):
    split = sources.Split("made up", lambda: [lines_of("the cat sat\n" * 30)])
    expected = tokenizers.encode(trained("char"), "the cat sat\n" * 30)
    cache = SCRATCH / "cache"
    cache.mkdir(exist_ok=True)
    corpus.tokenise(split, trained("char"), cache)
    (folder,) = cache.iterdir()
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    np.testing.assert_array_equal(corpus.tokenise(split, trained("char"), cache).tokens, expected)


@functools.cache
def prepared_folder():
    config, folder = draft(write_corpus(SCRATCH / "prepared text", train=40)), SCRATCH / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_Workers", WorkersHere)
        prepare(config, folder, Job(), shard_bytes=200)
    found, _ = shards.read(folder, "prepared")
    return config, folder, np.asarray(found["train"].tokens())


@fuzz
@given(damages(), st.sampled_from(["train/000001.tokens", "train/000001.json", "manifest.json", "preparation.json"]))
def test_a_prepared_folder_is_mended_or_refused(damage, name):
    config, folder, tokens = prepared_folder()
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(damage(before))
    try:
        with sentence_at_most():
            found = np.asarray(shards.read(folder, "prepared")[0]["train"].tokens())
            if name != "train/000001.tokens":  # whose hash is checked by preparing again, not at every start
                np.testing.assert_array_equal(found, tokens)
        with pytest.MonkeyPatch.context() as patch, sentence_at_most():
            patch.setattr(prepare_module, "_Workers", WorkersHere)
            prepare(config, folder, Job(), shard_bytes=200)
            np.testing.assert_array_equal(np.asarray(shards.read(folder, "prepared")[0]["train"].tokens()), tokens)
    finally:
        (folder / name).write_bytes(before)


# Files of runs


@functools.cache
def scored_run():
    workdir = untrained_run(draft(write_corpus(SCRATCH / "run text", train=40, valid=5, test=5)), SCRATCH / "run")
    for split in ("train", "valid"):
        RunFolder(workdir).append_metrics({"step": 1, "split": split, "tokens": 64, "seconds": 0.5, "loss": 2.5})
    (workdir / "environment.json").write_text("{}")
    evaluate_run(open_run(str(workdir)))
    return workdir


@fuzz
@given(
    damages(),
    st.sampled_from(["evaluation/test.npz", "evaluation/test.json", "metrics.jsonl", "config.json", "environment.json"]),
)
def test_damaged_files_of_a_run(damage, name):
    path = scored_run() / name
    before = path.read_bytes()
    path.write_bytes(damage(before))
    try:
        with sentence_at_most():
            run = read_run(scored_run())
            run.evaluation("test")
            run.token_scores("test")
        with sentence_at_most():
            RunFolder(str(scored_run())).cut_metrics(1)
    finally:
        path.write_bytes(before)


@fuzz
@given(
    st.dictionaries(
        st.sampled_from(["targets", "nll"]), st.sampled_from(["object", "text", "short", "integers", "two"]), min_size=1
    )
)
def test_npz_files_of_something_else(arrays):
    made = {
        "object": np.array([print, None], object),
        "text": np.array(["a"]),
        "short": np.zeros(1, np.float32),
        "integers": np.zeros(3, np.int64),
        "two": np.zeros((2, 2), np.float32),
    }
    assume(arrays)
    path = scored_run() / "evaluation" / "test.npz"
    before = path.read_bytes()
    np.savez(path, **{name: made[kind] for name, kind in arrays.items()})
    try:
        with sentence_at_most():
            read_run(scored_run()).token_scores("test")
            raise AssertionError("it was read")
    finally:
        path.write_bytes(before)
