"""Preparing a corpus: its text is tokenised once, by several processes, into shards that training reads in its place.

Each split is cut into parts of about as many bytes, and each part becomes one shard, whoever makes it: so the tokens are those
of `corpus.tokenise`, whatever the number of processes. A shard and the facts beside it are written whole or not at all; what
is there and sound is not made again.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lm.config import Config, resolve
from lm.data import corpus, shards, sources, tokenizers
from lm.data.lines import cuts, read_lines
from lm.errors import UserError
from lm.files import make_writable, read_json, sha256_of, whole_file, write_json

_PATIENCE = 3600  # seconds that other processes wait for the tokenizer of the first


@dataclasses.dataclass(frozen=True)
class Job:
    """How the work is done, which the tokens do not depend on.

    Attributes:
      num_workers: processes here.
      num_processes, process_id: of this verb, on one host or several, that share a folder; each makes every so many-th shard.
    """

    num_workers: int = 1
    num_processes: int = 1
    process_id: int = 0


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a preparation came to.

    Attributes:
      splits: facts of each split that is complete, as the manifest has them.
      missing: shards that other processes have yet to make; while there are any, there is no manifest.
    """

    splits: dict[str, dict[str, Any]]
    missing: int


def prepare(
    draft: Config,
    folder: pathlib.Path,
    job: Job,
    shard_bytes: int = 32 << 20,
    tokenizer: pathlib.Path | None = None,
    progress: Callable[[int], Any] = lambda num_bytes: None,
) -> Prepared:
    """Tokenises the config's three splits into a folder, for `config.data.prepared`.

    Args:
      shard_bytes: of text in each shard, about.
      tokenizer: the file of one that is to be used; None: trained on train, as the config says.
      progress: called with bytes of text that have become tokens.

    Raises:
      UserError: bad config or text; a folder of another preparation, or that cannot be written; a worker died.
    """
    data = _data(draft)
    _make_folder(folder)
    splits = sources.load(data)
    made_by = _tokenizer(data, splits["train"], folder, tokenizer, job)
    settings = {"data": shards.decisive(data), "tokenizer_sha256": tokenizers.sha256(made_by), "shard_bytes": shard_bytes}
    settings["tokenizer_text_sha256"] = None if tokenizer is not None else _sha256_of_text(splits["train"])
    _check_settings(folder, settings)
    if tokenizers.sha256(tokenizers.load(folder / "tokenizer.json")) != settings["tokenizer_sha256"]:
        raise UserError(f"{folder / 'tokenizer.json'} is not the one that the folder was begun with; use another --folder")
    at_newlines = made_by.ends_lines
    found = {}
    with _Workers(folder / "tokenizer.json", job.num_workers) as workers:
        for name, split in splits.items():
            _make_folder(folder / name)
            text = _Text(split, shard_bytes, at_newlines)
            tasks = (
                (_shard, part, _shard_path(folder, name, number), key)
                for number, (part, key) in enumerate(text.parts())
                if number % job.num_processes == job.process_id
            )
            for facts in workers.map(tasks):
                progress(facts["num_bytes"])
            found[name] = {"sha256": text.sha256(), "keys": text.keys}
    return _finish(folder, found, made_by)


def total_bytes(draft: Config, job: Job) -> int | None:
    """Bytes of text that `prepare` will tell of as progress; None where that is not known beforehand."""
    files = [split.file for split in sources.load(_data(draft)).values()]
    if None in files:
        return None
    return sum(os.path.getsize(file) for file in files) // job.num_processes


def _data(draft):
    data = resolve(draft).data
    if data.prepared is not None:
        raise UserError("config.data.prepared is set, but it is what is to be made here; set it to None")
    return data


class _Text:
    """A split cut into parts, each a split of its own; and what is known of the whole once all have been given.

    Attributes:
      keys: of the parts so far, each telling a part from another that stood in its place before.
    """

    def __init__(self, split, shard_bytes, at_newlines):
        self._split, self._shard_bytes, self._at_newlines = split, shard_bytes, at_newlines
        self._digest = hashlib.sha256()
        self._sha256_of_file = sha256_of(split.file) if split.file else None
        self.keys: list[str] = []

    def parts(self) -> Iterator[tuple[sources.Split, str]]:
        """Each part with its key."""
        for part, key in self._of_file() if self._split.file else self._of_stream():
            self.keys.append(key)
            yield part, key

    def sha256(self) -> str:
        """Hash of the text, as `sources.Split.size` has it."""
        return self._sha256_of_file or self._digest.hexdigest()

    def _of_file(self):
        path = self._split.file
        for start, stop in cuts(path, self._shard_bytes):
            lines = functools.partial(read_lines, path, start, stop)
            part = dataclasses.replace(self._split, documents=functools.partial(sources.one_document, lines), file=None)
            yield part, f"{start} to {stop} of {self._sha256_of_file}"

    def _of_stream(self):
        for documents in self._gathered():
            held = functools.partial(_held, documents)
            yield dataclasses.replace(self._split, documents=held, floor=None), self._key(documents)

    def _gathered(self):
        """The documents, or pieces of an open one, that make up each part."""
        documents, filled = [], 0
        for document in self._split.documents():
            documents.append([])
            for line in document:
                documents[-1].append(line)
                filled += len(line.encode())
                if filled >= self._shard_bytes and not self._split.closed and (line.endswith("\n") or not self._at_newlines):
                    yield documents
                    documents, filled = [[]], 0
            if filled >= self._shard_bytes and self._split.closed:
                yield documents
                documents, filled = [], 0
        yield documents

    def _key(self, documents):
        part = hashlib.sha256()
        for lines in documents:
            text = "".join(lines).encode() + b"\0" * self._split.closed
            part.update(text)
            self._digest.update(text)
        return part.hexdigest()


def _held(documents):
    return documents


def _sha256_of_text(split):
    """As `sources.Split.size` has it, without counting words where the text is a file's bytes."""
    return sha256_of(split.file) if split.file else split.size.sha256


def _tokenizer(data, train, folder, given, job) -> tokenizers.Tokenizer:
    """The one that the folder was begun with, else the given one or one that is trained now, put there.

    What lies there before preparation.json does is of something else, or of a beginning that was broken off.
    """
    path, begun = folder / "tokenizer.json", folder / "preparation.json"
    if given is not None:
        found = tokenizers.load(given)
        if found.name != data.tokenizer:
            raise UserError(f"--tokenizer={given} is a {found.name} tokenizer, but config.data.tokenizer is {data.tokenizer!r}")
        if not begun.exists():
            tokenizers.save(found, path)
        return found
    started = time.monotonic()
    while job.process_id and not begun.exists():
        if time.monotonic() - started > _PATIENCE:
            raise UserError(
                f"process 0 has left no {begun} in {_PATIENCE} s; start it, or give each process the same --tokenizer=FILE"
            )
        time.sleep(1)
    if not begun.exists():
        tokenizers.save(tokenizers.fit(data, train), path)
    return tokenizers.load(path)


def _make_folder(folder):
    try:
        make_writable(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None


def _check_settings(folder, settings):
    """Raises a UserError if the folder was begun with other settings; else notes them."""
    path = folder / "preparation.json"
    if not path.exists():
        write_json(path, settings)
        return
    begun = read_json(path, "")
    if not isinstance(begun, dict) or not isinstance(begun.get("data"), dict):
        raise UserError(f"{path} is damaged; use another --folder")
    for name, now in [*settings["data"].items(), *((name, value) for name, value in settings.items() if name != "data")]:
        then = begun.get(name) if name in begun else begun["data"].get(name)
        if name == "tokenizer_text_sha256":
            if now not in (None, then):  # None: the tokenizer is given, and may meet another text
                raise UserError(
                    f"{folder} was begun with another train text or with --tokenizer, which decides what its tokens mean; use "
                    f"another --folder, or the same tokenizer again by --tokenizer={folder / 'tokenizer.json'}"
                )
        elif then != now:
            raise UserError(f"{folder} was begun with {name} = {then!r}, but it is {now!r} now; use another --folder")


def _shard_path(folder, split, number):
    return folder / split / f"{number:06d}.tokens"


def _finish(folder, texts, tokenizer) -> Prepared:
    """Writes the manifest if every shard is there."""
    splits, missing = {}, 0
    for name, text in texts.items():
        paths = [_shard_path(folder, name, number) for number in range(len(text["keys"]))]
        facts = [_facts_of(path, key) for path, key in zip(paths, text["keys"], strict=True)]
        missing += facts.count(None)
        if None in facts:
            continue
        splits[name] = {
            "sha256": text["sha256"],
            **{total: sum(shard[total] for shard in facts) for total in ("num_bytes", "num_words", "tokens")},
            "dtype": corpus.token_type(tokenizer.vocab_size).name,
            "largest": max(shard["largest"] for shard in facts),
            "shards": [
                {"file": f"{name}/{path.name}", "tokens": shard["tokens"], "sha256": shard["sha256"]}
                for path, shard in zip(paths, facts, strict=True)
                if shard["tokens"]
            ],
        }
    if not missing:
        settings = read_json(folder / "preparation.json", f"{folder} has lost its preparation.json; use another --folder")
        shards.write_manifest(folder, {**settings, "splits": splits})
        for left_over in folder.glob("*/.*.tokens.*"):  # by a process that was killed
            left_over.unlink(missing_ok=True)
    return Prepared(splits, missing)


def _facts_path(path):
    return path.with_suffix(".json")


def _facts_of(path, key):
    """What is noted beside a shard of the part with that key; None where nothing sound is, or of another text."""
    try:
        found = json.loads(_facts_path(path).read_text())
        sound = {"key", "tokens", "num_bytes", "num_words", "largest", "sha256"} <= set(found)
        return found if sound and found["key"] == key else None
    except (OSError, ValueError, TypeError):
        return None


# In a worker.

_worker_tokenizer: tokenizers.Tokenizer | None = None


def _begin_worker(tokenizer):
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker, one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = tokenizers.load(tokenizer)


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _shard(part, path, key):
    """Makes a shard, unless it is there and sound; returns its facts. A folder in which one is made is not complete any more."""
    there = _facts_of(path, key)
    if there is not None and path.is_file() and sha256_of(path) == there["sha256"]:
        return there
    shards.manifest_path(path.parent.parent).unlink(missing_ok=True)
    facts = {"key": key, **_write_shard(part, path)}
    write_json(_facts_path(path), facts)
    return facts


def _write_shard(part, path):
    counts = {"num_bytes": 0, "num_words": 0}

    def counted(lines):
        for line in lines:
            counts["num_bytes"] += len(line.encode())
            counts["num_words"] += len(line.split())
            yield line

    tokenizer, documents = _worker_tokenizer, part.documents
    part = dataclasses.replace(part, documents=lambda: map(counted, documents()))
    dtype, digest, tokens, largest = corpus.token_type(tokenizer.vocab_size), hashlib.sha256(), 0, 0
    with whole_file(path) as file:
        for ids in _gathered_ids(corpus.token_ids(part, tokenizer)):
            tokens, largest = tokens + len(ids), max(largest, int(ids.max()))
            piece = ids.astype(dtype).tobytes()
            digest.update(piece)
            file.write(piece)
    return {**counts, "tokens": tokens, "largest": largest, "sha256": digest.hexdigest()}


def _gathered_ids(lines, at_once=1 << 16):
    """The same ids in fewer arrays."""
    lines = (ids for ids in lines if len(ids))
    while some := list(itertools.islice(lines, at_once >> 4)):
        yield np.concatenate(some)


class _Workers:
    """Processes that make shards; use as a context."""

    def __init__(self, tokenizer, number):
        self._number = number
        self._pool = concurrent.futures.ProcessPoolExecutor(
            number, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(tokenizer,)
        )

    def map(self, tasks) -> Iterator[Any]:
        """The results of (function, *arguments), in order; few tasks are held at a time, however many there are."""
        waiting: collections.deque = collections.deque()
        try:
            for function, *arguments in tasks:
                if len(waiting) > self._number:
                    yield waiting.popleft().result()
                waiting.append(self._pool.submit(function, *arguments))
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a worker ended before its shard was done, as happens where memory runs out; the same command goes on, with "
                "fewer --workers or, into another folder, a smaller --shard_mib"
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown(wait=True, cancel_futures=True)
