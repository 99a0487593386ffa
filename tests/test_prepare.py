"""lm.data.prepare and launch.prepare_data: the tokens of the text, whoever makes them, whatever breaks off or in."""

import dataclasses
import gzip
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, WorkersHere, call_verbs, changed, config_file, draft, refused, write_corpus

from lm.config import resolve
from lm.data import corpus, prepare as prepare_module, shards, sources, tokenizers
from lm.data.lines import cuts, read_lines
from lm.data.prepare import Job, prepare, total_bytes
from lm.data.shards import Shards
from lm.evaluation.evaluate import evaluate_run
from lm.runs.open import open_run
from lm.training.train import prepare as prepare_experiment, train


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(prepare_module, "_Workers", WorkersHere)


def shard_files(folder):
    return sorted(folder.glob("*/*.tokens"))


def contents(folder):
    """Bytes of everything in a folder, by name; without what tells when a text file was changed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def kinds(folder):
    """Configs of every kind of source, small."""
    text = write_corpus(folder / "text", train=120)
    zipped = folder / "zipped"
    zipped.mkdir()
    for split in ("train", "valid", "test"):
        (zipped / f"{split}.txt.gz").write_bytes(gzip.compress((text / f"{split}.txt").read_bytes()))
    one = folder / "one.txt"
    one.write_bytes((text / "train.txt").read_bytes()[:-1])  # no newline at its end
    base = draft(text)
    yield "files", base
    yield "zipped", changed(draft(text), data__path=str(zipped))
    yield "one file", changed(draft(text), data__path=str(one), data__fractions=(0.8, 0.1, 0.1))
    synthetic = changed(draft(text), data__source="synthetic", data__path=None, data__num_characters=3000)
    yield "synthetic", synthetic


@pytest.mark.parametrize("tokenizer", ["char", "byte", "word", "subword"])
def test_the_tokens_are_those_of_the_text(tokenizer, tmp_path, here):
    for name, config in kinds(tmp_path):
        if config.data.source == "synthetic" and tokenizer not in ("char", "byte"):
            continue
        config.data.tokenizer = tokenizer
        if tokenizer == "subword":
            config.data.vocab_size = 270
        folder = tmp_path / f"prepared {name}"
        found = prepare(config, folder, Job(), shard_bytes=300)
        data, cache = resolve(config).data, corpus.cache_dir(config.data)
        splits = sources.load(data)
        made_by = tokenizers.train(data, splits["train"], cache)
        read = sources.load(resolve(changed(config, data__prepared=str(folder))).data)
        again = tokenizers.train(data, read["train"], cache)
        assert tokenizers.sha256(again) == tokenizers.sha256(made_by)
        for split in sources.SPLITS:
            expected, ours = (corpus.tokenise(which[split], made_by, cache) for which in (splits, read))
            np.testing.assert_array_equal(np.asarray(ours.tokens), expected.tokens, err_msg=f"{name} {split}")
            assert ours.size == expected.size and ours.tokens.dtype == expected.tokens.dtype
            assert (ours.vocab_size, ours.eos) == (expected.vocab_size, expected.eos)
            assert ours.tokens.largest == expected.tokens.max() == found.splits[split]["largest"]
        if name != "synthetic":  # whose lines never end
            assert len(shard_files(folder)) > 5


def test_closed_documents(tmp_path, here, monkeypatch):
    documents = [["a b\n", "b\n"], ["\n"], ["b"], ["a\n"] * 40, [""]]
    split = sources.Split("made up", lambda: iter(documents), closed=True)
    monkeypatch.setattr(prepare_module.sources, "load", lambda data: dict.fromkeys(sources.SPLITS, split))
    for tokenizer in ("char", "word"):
        config = draft(write_corpus(tmp_path / tokenizer), data__tokenizer=tokenizer)
        for shard_bytes in (1, 7, 1000):
            folder = tmp_path / f"{tokenizer} {shard_bytes}"
            prepare(config, folder, Job(), shard_bytes=shard_bytes)
            made_by = tokenizers.load(folder / "tokenizer.json")
            expected = corpus.tokenise(split, made_by, tmp_path)
            found, _ = shards.read(folder, "prepared")
            np.testing.assert_array_equal(np.asarray(found["train"].tokens()), expected.tokens)
            facts = found["train"].facts
            assert (facts["sha256"], facts["num_bytes"], facts["num_words"]) == dataclasses.astuple(split.size)


def test_parts_of_a_file_end_where_lines_do(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join("x" * n + "\n" for n in (0, 3, 200_000, 1, 0, 0, 5)) + "end")
    lines = list(read_lines(path))
    for num_bytes in (1, 2, 4, 5, 1000, 200_010, 10**7):
        parts = list(cuts(path, num_bytes))
        assert parts[0][0] == 0 and parts[-1][1] == path.stat().st_size
        assert all(left[1] == right[0] for left, right in itertools.pairwise(parts))
        assert [line for part in parts for line in read_lines(path, *part)] == lines
        assert all(stop - start >= num_bytes for start, stop in parts[:-1])
    (tmp_path / "bad.txt").write_bytes(b"good\ngood\nbad\xff\n")
    with refused("not UTF-8", "line 2 from byte 5 on, column 4"):
        list(read_lines(tmp_path / "bad.txt", 5, 15))


def test_shards_are_one_array(tmp_path):
    rng = np.random.default_rng(0)
    lengths = [5, 1, 9, 4]
    parts = [rng.integers(0, 1000, length).astype(np.uint16) for length in lengths]
    paths = [tmp_path / str(number) for number in range(4)]
    for path, part in zip(paths, parts, strict=True):
        part.tofile(path)
    whole, found = np.concatenate(parts), Shards(paths, lengths, "uint16", 999)
    assert len(found) == len(whole) and found.dtype == whole.dtype
    for start in range(len(whole) + 2):
        for stop in range(start, len(whole) + 3):
            np.testing.assert_array_equal(found[start:stop], whole[start:stop])
    index = rng.integers(0, len(whole), (6, 7))
    np.testing.assert_array_equal(found[index], whole[index])
    assert found[7] == whole[7] and np.asarray(found).dtype == np.uint16
    np.testing.assert_array_equal(np.asarray(found), whole)
    assert len(Shards([], [], "uint16", 0)) == 0


def prepared_by_verb(config, folder, *flags, start=subprocess.run):
    command = [sys.executable, "-m", "launch.prepare_data", f"--config={config}", f"--folder={folder}", *flags]
    return start(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """The config file of a corpus of several shards of a MiB, and what one worker made of it."""
    folder = tmp_path_factory.mktemp("big")
    text = write_corpus(folder / "text", train=400_000)
    config = config_file(folder / "config.py", draft(text, data__tokenizer="word"))
    done = prepared_by_verb(config, folder / "whole", "--workers=1", "--shard_mib=1")
    assert done.returncode == 0, done.stderr
    assert len(shard_files(folder / "whole")) >= 7
    return config, folder / "whole"


def test_any_number_of_workers_makes_the_same(big, tmp_path):
    config, whole = big
    done = prepared_by_verb(config, tmp_path / "three", "--workers=3", "--shard_mib=1", "--config.seed=1")
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stdout and "3 workers" in done.stdout
    assert f"launch.train --config={config} --config.seed=1 --config.data.prepared={tmp_path / 'three'} " in done.stdout
    assert contents(tmp_path / "three") == contents(whole)
    for process in (1, 0):
        if process == 1:
            (tmp_path / "two").mkdir()
            for name in ("tokenizer.json", "preparation.json"):
                shutil.copy(whole / name, tmp_path / "two")
        share = ("--workers=1", "--shard_mib=1", "--num_processes=2", f"--process_id={process}")
        done = prepared_by_verb(config, tmp_path / "two", *share)
        assert done.returncode == 0, done.stderr
        assert ("still to come" in done.stdout) == (process == 1)
        assert shards.manifest_path(tmp_path / "two").exists() == (process == 0)
    assert contents(tmp_path / "two") == contents(whole)


def test_killed_it_goes_on_and_makes_no_shard_twice(big, tmp_path):
    config, whole = big
    folder = tmp_path / "killed"
    process = prepared_by_verb(config, folder, "--workers=2", "--shard_mib=1", start=subprocess.Popen)
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("train/*.json"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not shards.manifest_path(folder).exists()
    with refused("no folder that launch.prepare_data has finished", "config.data.prepared"):
        shards.read(folder, "prepared")
    time.sleep(1)  # its workers see that it is gone, and go
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("train/*.json")}
    done = prepared_by_verb(config, folder, "--workers=2", "--shard_mib=1")
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "facts cut", "facts missing", "another text"])
def test_what_is_damaged_is_made_again_and_nothing_else(how, tmp_path, here):
    text = write_corpus(tmp_path / "text")
    config, folder = draft(text), tmp_path / "prepared"
    prepare(config, folder, Job(), shard_bytes=2000)
    before, victim = contents(folder), shard_files(folder)[-1 if how == "flipped" else 2]  # of valid; of train
    facts, content = victim.with_suffix(".json"), victim.read_bytes()
    if how == "flipped":
        victim.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
    elif how == "truncated":
        victim.write_bytes(content[:-2])
    elif how == "missing":
        victim.unlink()
    elif how == "facts cut":
        facts.write_text(facts.read_text()[:30])
    elif how == "facts missing":
        facts.unlink()
    elif how == "another text":
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "key": "another"}))
    if how in ("flipped", "truncated", "missing"):
        with refused(str(victim), "run launch.prepare_data again"):
            prepare_experiment(changed(config, data__prepared=str(folder)))
        config.data.prepared = None
    others = {path: path.stat().st_mtime_ns for path in shard_files(folder) if path != victim}
    victim_before = victim.stat().st_mtime_ns if victim.exists() else None
    prepare(config, folder, Job(), shard_bytes=2000)
    assert contents(folder) == before
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert victim.stat().st_mtime_ns != victim_before


@pytest.mark.parametrize(
    ("field", "value"), [("vocab_size", 280), ("min_count", 2), ("fractions", (0.8, 0.1, 0.1)), ("tokenizer", "byte")]
)
def test_what_decides_the_tokens_is_compared(field, value, tmp_path, here):
    one = tmp_path / "text.txt"
    one.write_bytes((write_corpus(tmp_path / "text") / "train.txt").read_bytes())
    kind = {"vocab_size": dict(data__tokenizer="subword", data__vocab_size=270), "min_count": dict(data__tokenizer="word")}
    config = changed(draft(tmp_path), data__path=str(one), **kind.get(field, {}))
    prepare(config, tmp_path / "prepared", Job())
    others = dict(data__seq_len=5, data__seq_len_std=1.0, data__batch_size=2)  # decide nothing
    sources.load(resolve(changed(config, **others, data__prepared=str(tmp_path / "prepared"))).data)
    with refused(f"was made with config.data.{field} = ", f"but it is {json.loads(json.dumps(value))!r} now"):
        sources.load(resolve(changed(config, **{f"data__{field}": value})).data)


def test_the_text_counts_not_when_its_file_was_written(tmp_path, here):
    """Hosts with copies of their own make one folder; and a text of the same size and date is another text."""
    text, folder = write_corpus(tmp_path / "text"), tmp_path / "prepared"
    copy = shutil.copytree(text, tmp_path / "copy")
    for path in copy.glob("*.txt"):
        os.utime(path, (1e9, 1e9))
    assert prepare(draft(text), folder, Job(num_processes=2), shard_bytes=2000).missing > 0
    assert prepare(draft(copy), folder, Job(num_processes=2, process_id=1), shard_bytes=2000).missing == 0

    test = text / "test.txt"
    date, content = test.stat().st_mtime_ns, test.read_text()
    test.write_text(content[::-1])
    os.utime(test, ns=(date, date))
    prepare(draft(text), folder, Job(), shard_bytes=2000)
    found, _ = shards.read(folder, "prepared")
    made_by = tokenizers.load(folder / "tokenizer.json")
    np.testing.assert_array_equal(np.asarray(found["test"].tokens()), tokenizers.encode(made_by, content[::-1]))
    bare = changed(draft(text), data__path=None, data__prepared=str(folder))
    assert sources.load(resolve(bare).data)["test"].size.num_bytes == len(content)  # the text itself is not needed any more


def test_another_text_needs_another_folder_or_the_old_tokenizer_by_name(tmp_path, here):
    text = write_corpus(tmp_path / "text")
    config, folder = draft(text), tmp_path / "prepared"
    prepare(config, folder, Job(), shard_bytes=2000)
    (text / "train.txt").write_text("ß" + (text / "train.txt").read_text())
    with refused(f"{folder} was begun with another train text", "another --folder", f"--tokenizer={folder / 'tokenizer.json'}"):
        prepare(config, folder, Job(), shard_bytes=2000)
    given = folder / "tokenizer.json"
    first = prepare(config, folder, Job(num_processes=2), shard_bytes=2000, tokenizer=given)
    assert first.missing > 0 and not shards.manifest_path(folder).exists()  # half of the shards are of the old text
    assert prepare(config, folder, Job(num_processes=2, process_id=1), shard_bytes=2000, tokenizer=given).missing == 0
    found, _ = shards.read(folder, "prepared")
    split = sources.load(resolve(config).data)["train"]
    expected = corpus.tokenise(split, tokenizers.load(given), tmp_path)
    np.testing.assert_array_equal(np.asarray(found["train"].tokens()), expected.tokens)
    assert found["train"].facts["sha256"] == split.size.sha256


def test_bad_input_is_one_sentence(tmp_path, here):
    text = write_corpus(tmp_path / "text")
    config, folder = draft(text), tmp_path / "prepared"
    prepare(config, folder, Job(), shard_bytes=2000)
    with refused("was begun with shard_bytes = 2000, but it is 3000 now", "another --folder"):
        prepare(config, folder, Job(), shard_bytes=3000)
    with refused("was begun with tokenizer = 'char', but it is 'byte' now"):
        prepare(changed(draft(text), data__tokenizer="byte"), folder, Job(), shard_bytes=2000, tokenizer=None)
    with refused("config.data.prepared is set"):
        total_bytes(changed(draft(text), data__prepared=str(tmp_path / "nowhere")), Job())
    with refused("config.data.prepared is set"):
        prepare(changed(draft(text), data__prepared=str(folder)), tmp_path / "other", Job())
    with refused("is a char tokenizer, but config.data.tokenizer is 'byte'"):
        tokenizer = folder / "tokenizer.json"
        prepare(changed(draft(text), data__tokenizer="byte"), tmp_path / "other", Job(), tokenizer=tokenizer)
    broken = write_corpus(tmp_path / "broken")
    (broken / "train.txt").rename(broken / "elsewhere")
    (broken / "train.txt").symlink_to("nowhere")
    for damage in (lambda: None, lambda: ((broken / "train.txt").unlink(), (broken / "train.txt").mkdir())):
        damage()
        for call in (lambda: total_bytes(draft(broken), Job()), lambda: prepare(draft(broken), tmp_path / "other", Job())):
            with refused(f"{broken / 'train.txt'} cannot be read"):
                call()
    (tmp_path / "file").write_text("")
    with refused(f"{tmp_path / 'file'} cannot be written"):
        prepare(config, tmp_path / "file", Job())
    with refused("was made with config.data.tokenizer = 'char', but it is 'byte' now"):
        prepare_experiment(draft(text, data__tokenizer="byte", data__prepared=str(folder)))
    with refused("config.data.prepared", "no folder that launch.prepare_data has finished"):
        prepare_experiment(draft(text, data__prepared=str(tmp_path / "nothing")))
    manifest = shards.manifest_path(folder)
    for damage, sentence in (("{", "is damaged"), ("{}", "is no manifest"), ('{"format": 7}', "has format 7, not 1")):
        manifest.write_text(damage)
        with refused(str(manifest), sentence):
            shards.read(folder, "prepared")


def test_a_worker_that_dies(big, tmp_path, monkeypatch):
    config, _ = big
    process = prepared_by_verb(config, tmp_path / "killed", "--workers=1", "--shard_mib=1", start=subprocess.Popen)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("train/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("the children of a process are looked up in /proc")
    for child in map(int, children.read_text().split()):
        if b"spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "a worker ended before its shard was done" in err and "Traceback" not in err


def test_a_run_is_the_same_from_shards_and_from_text(tmp_path, here):
    text = write_corpus(tmp_path / "text")
    settings = dict(training__num_steps=6, training__evaluate_every_steps=3, data__tokenizer="word")
    train(draft(text, **settings), str(tmp_path / "from text"))
    folder = tmp_path / "prepared"
    prepare(draft(text, **settings), folder, Job(), shard_bytes=1000)
    half = {**settings, "training__num_steps": 3}
    train(draft(text, **half), str(tmp_path / "from both"))  # begun on the text
    shutil.rmtree(text)
    for name in ("from shards", "from both"):
        train(draft(text, **settings, data__prepared=str(folder)), str(tmp_path / name))
    scores = []
    for name in ("from text", "from shards", "from both"):
        run = open_run(str(tmp_path / name), "best")
        if name == "from text":
            write_corpus(text)
        scores.append(evaluate_run(run))
        if name == "from text":
            shutil.rmtree(text)
    for other in scores[1:]:
        assert other["nll_sum"] == scores[0]["nll_sum"]
        for field in ("tokens", "bytes", "words", "text_sha256", "tokenizer"):
            assert other[field] == scores[0][field]


def test_another_tokenizer_than_the_runs_is_refused(tmp_path, here):
    text = write_corpus(tmp_path / "text")
    train(draft(text, training__num_steps=1), str(tmp_path / "run"))
    saved = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**saved, "symbols": [*saved["symbols"], "ß"]}))
    prepare(draft(text), tmp_path / "prepared", Job(), tokenizer=other)
    with refused("the tokens of another tokenizer", "--tokenizer=FILE"):
        train(draft(text, training__num_steps=2, data__prepared=str(tmp_path / "prepared")), str(tmp_path / "run"))
    prepare(draft(text), tmp_path / "same", Job(), tokenizer=tmp_path / "run" / "tokenizer.json")
    train(draft(text, training__num_steps=2, data__prepared=str(tmp_path / "same")), str(tmp_path / "run"))


def test_bad_flags(tmp_path):
    config = config_file(tmp_path / "config.py", draft(write_corpus(tmp_path / "text")))
    calls = [
        ["launch.prepare_data"],
        ["launch.prepare_data", f"--config={config}"],
        ["launch.prepare_data", f"--config={config}", f"--folder={tmp_path / 'x'}", "--num_processes=2", "--process_id=2"],
        ["launch.prepare_data", f"--config={config}", f"--folder={tmp_path / 'x'}", "--workers=0"],
        ["launch.prepare_data", f"--config={config}", f"--folder={tmp_path / 'x'}", "--config.data.path=/nowhere"],
    ]
    sentences = [
        "--config is missing",
        "--folder is missing",
        "must be below --num_processes=2",
        "--workers",
        "'/nowhere' does not exist",
    ]
    for done, sentence in zip(call_verbs(calls, tmp_path / "calls"), sentences, strict=True):
        assert done.code == 1 and sentence in done.err and "Traceback" not in done.err


def test_a_tokenizer_that_lies_in_the_folder_before_it_is_begun_is_not_used(tmp_path):
    """As after a beginning that was broken off, or in a run's folder."""
    text = write_corpus(tmp_path / "text")
    other = tokenizers.fit(draft(text, data__tokenizer="byte").data, None)
    for name, given in (("trained", False), ("given", True)):
        folder = tmp_path / name
        folder.mkdir()
        tokenizers.save(other, folder / "tokenizer.json")
        prepare(draft(text), folder, Job(), tokenizer=tmp_path / "trained" / "tokenizer.json" if given else None)
        made_by = tokenizers.load(folder / "tokenizer.json")
        assert made_by.name == "char"
        assert shards.read(folder, "config.data.prepared")[0]["train"].tokenizer_sha256 == tokenizers.sha256(made_by)
    tokenizers.save(other, folder / "tokenizer.json")
    with refused("tokenizer.json is not the one that the folder was begun with"):
        prepare(draft(text), folder, Job(), tokenizer=tmp_path / "trained" / "tokenizer.json")
