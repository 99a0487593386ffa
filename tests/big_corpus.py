"""Makes a corpus of gigabytes, prepares it and reads it as training does: python tests/big_corpus.py --texts=A,B --folder=D

The lines of some texts are repeated in a new order each time (seeded) until there are enough. Then launch.prepare_data makes
shards of them, watched for speed and memory, and batches are read from those, in shuffled windows and in streams: first with
none of it in the page cache, then with all. Nothing is removed from the folder; what is there is not made again.
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import threading
import time

from lm.config import Config, resolve, to_json
from lm.data import corpus, sources, tokenizers
from lm.data.batches import batches

ROOT = pathlib.Path(__file__).parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", required=True, help="files, separated by commas")
    parser.add_argument("--folder", required=True, type=pathlib.Path)
    parser.add_argument("--gib", type=float, default=2, help="of text to make")
    parser.add_argument("--tokenizer", default="subword", choices=["byte", "char", "word", "subword"])
    parser.add_argument("--vocab_size", type=int, default=None, help="of word and subword")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    texts = [pathlib.Path(text).resolve() for text in options.texts.split(",")]
    made = make_text(texts, options.folder / "text", options.gib)
    draft = Config()
    draft.data.source, draft.data.path = "text", str(made)
    draft.data.tokenizer, draft.data.vocab_size = options.tokenizer, options.vocab_size
    prepared = options.folder / f"{options.tokenizer} {options.workers}"
    if not (prepared / "manifest.json").exists():
        prepare(draft, prepared, texts, options)
    draft.data.prepared = str(prepared)
    for order in ("windows", "stream"):
        read(draft, order, prepared)


def make_text(texts, folder, gib):
    """A folder of train, valid and test."""
    if (folder / "train.txt").exists():
        return folder
    folder.mkdir(parents=True)
    lines = [line for text in texts for line in text.read_bytes().splitlines(keepends=True)]
    for split in ("valid", "test"):
        (folder / f"{split}.txt").write_bytes(b"".join(lines[:1000]))
    draw, written = random.Random(0), 0
    with (folder / "half made").open("wb") as file:
        while written < gib * 2**30:
            draw.shuffle(lines)
            written += file.write(b"".join(lines))
    (folder / "half made").rename(folder / "train.txt")
    print(f"made {written:,} bytes of text from {sum(text.stat().st_size for text in texts):,}", flush=True)
    return folder


def prepare(draft, prepared, texts, options):
    """By the verb; with a tokenizer trained on the texts as they came, so that what is timed is tokenising."""
    prepared.mkdir(parents=True)
    data = resolve(draft).data
    once = sources.Split("the texts", lambda: (text.open(encoding="utf-8", newline="") for text in texts))
    tokenizers.save(tokenizers.fit(data, once), prepared.parent / f"{options.tokenizer}.json")
    (prepared.parent / "config.py").write_text(
        f"from lm.config import from_json\n\n\ndef get_config(argument=''):\n    return from_json({to_json(draft)!r})\n"
    )
    command = [sys.executable, "-m", "launch.prepare_data", f"--config={prepared.parent / 'config.py'}", f"--folder={prepared}"]
    command += [f"--tokenizer={prepared.parent / options.tokenizer}.json", f"--workers={options.workers}"]
    result = prepared.parent / "result.json"
    started = time.perf_counter()
    process = subprocess.Popen([*command, f"--json={result}"], cwd=ROOT)
    peak = Peak(process.pid)
    assert process.wait() == 0
    seconds, found = time.perf_counter() - started, json.loads(result.read_text())
    megabytes = found["bytes"] / 1e6
    print(
        f"{options.tokenizer}: {megabytes:,.0f} MB, {found['splits']['train']['tokens']:,} tokens in {seconds:.0f} s by "
        f"{options.workers} workers: {megabytes / seconds / options.workers:.2f} MB/s per worker; {peak.stop():,.0f} MiB "
        "resident at most, all processes together",
        flush=True,
    )


class Peak:
    """Resident memory of a process and its children, the most of what is seen ten times a second."""

    def __init__(self, pid):
        self._pid, self._most, self._done = pid, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self):
        while not self._done.wait(0.1):
            self._most = max(self._most, self._resident(self._pid))

    def _resident(self, pid):
        try:
            pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
            children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20 + sum(map(self._resident, children))

    def stop(self):
        """MiB."""
        self._done.set()
        self._thread.join()
        return self._most


def read(draft, order, prepared, num_batches=2000):
    """Batches of 32 x 128 at random steps, one thread."""
    draft.data.order, draft.data.batch_size, draft.data.seq_len = order, 32, 128
    config = resolve(draft)
    split = sources.load(config.data)["train"]
    tokenizer = tokenizers.train(config.data, split, corpus.cache_dir(config.data))
    source = batches(config, corpus.tokenise(split, tokenizer, corpus.cache_dir(config.data)), {})
    draw, rates = random.Random(0), {}
    steps = [draw.randrange(int(source.steps_per_epoch)) for _ in range(num_batches)]
    for how in ("not in memory", "in memory"):
        if how == "not in memory":
            for shard in prepared.glob("train/*.tokens"):
                with shard.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            for step in steps:
                source.batch(step, slice(None))
        seconds = []
        for step in steps:
            started = time.perf_counter()
            source.batch(step, slice(None))
            seconds.append(time.perf_counter() - started)
        rates[how] = 32 * 128 * num_batches / sum(seconds), max(seconds), statistics.median(seconds)
    print(
        f"{order}: "
        + "; ".join(
            f"{rate:,.0f} tokens/s {how} (median {median * 1e3:.2f} ms a batch of 32 x 128, longest {longest * 1e3:.1f})"
            for how, (rate, longest, median) in rates.items()
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
