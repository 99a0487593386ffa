"""What several test files share: a tiny corpus, tiny configs, runs that were never trained, many calls of the verbs at once."""

import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

from lm.config import Config, resolve, to_json
from lm.data.corpus import Corpus
from lm.data.sources import TextSize
from lm.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
WORDS = [
    "the",
    "a",
    "of",
    "cat",
    "dog",
    "bird",
    "tree",
    "river",
    "sat",
    "ran",
    "flew",
    "saw",
    "on",
    "under",
    "near",
    "old",
    "red",
]


@contextlib.contextmanager
def refused(*parts: str):
    """Passes if the body raises a UserError of one sentence that holds every part."""
    with pytest.raises(UserError) as caught:
        yield
    sentence = str(caught.value)
    assert "\n" not in sentence and "Traceback" not in sentence
    assert not [part for part in parts if part not in sentence], sentence


def write_corpus(folder: pathlib.Path, train=300, valid=30, test=30, seed=0) -> pathlib.Path:
    """train.txt, valid.txt and test.txt with so many lines of random words each."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for split, lines in (("train", train), ("valid", valid), ("test", test)):
        sentences = (" ".join(draw.choices(WORDS, k=draw.randint(0, 7))) + "\n" for _ in range(lines))
        (folder / f"{split}.txt").write_text("".join(sentences))
    return folder


def draft(corpus: pathlib.Path, architecture: str = "lstm", **fields) -> Config:
    """A config of a model of width 8 over characters; fields as section__field, those at the top by their own name."""
    values = {
        "data__source": "text",
        "data__path": str(corpus),
        "data__tokenizer": "char",
        "data__cache_dir": str(corpus / "cache"),
        "data__seq_len": 8,
        "data__batch_size": 4,
        "model__architecture": architecture,
        "num_devices": 1,
    }
    if architecture != "ngram":
        values |= {"model__num_layers": 1, "model__hidden_dim": 8}
    if architecture == "transformer":
        values |= {"model__num_heads": 2, "data__order": "windows"}
    return changed(Config(), **(values | fields))


def changed(config: Config, **fields) -> Config:
    """The same config object with fields set, as section__field."""
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(config, section) if section else config, field, value)
    return config


def corpus_of(tokens, vocab_size: int, eos: int = 0, name: str = "made up") -> Corpus:
    """A corpus of given tokens, as if of as many bytes and words."""
    tokens = np.asarray(tokens)
    return Corpus(name, tokens, TextSize("no text", len(tokens), len(tokens)), vocab_size, eos)


def config_file(path: pathlib.Path, config: Config) -> pathlib.Path:
    """Writes a config file for --config that returns a draft."""
    path.write_text(
        "import json\nfrom lm.config import from_json\n\n\n"
        f"def get_config():\n    return from_json(json.loads({json.dumps(to_json(config))!r}))\n"
    )
    return path


def model_and_params(architecture: str, vocab_size: int, scale: float = 3.0, **fields):
    """A model of width 8, and fresh parameters times a scale that makes it prefer some tokens clearly."""
    import jax

    from lm.models.build import build, initialise

    config = resolve(draft(pathlib.Path("nowhere"), architecture, **fields))
    model = build(config, vocab_size)
    return model, jax.tree.map(lambda x: np.asarray(x) * scale, initialise(model, config.seed))


def untrained_run(config: Config, workdir: pathlib.Path, scale: float = 1.0, steps=(1,)) -> pathlib.Path:
    """A run's folder as training leaves it, its parameters fresh ones times a scale (n-grams: counted)."""
    import jax

    from lm.data import tokenizers
    from lm.models.build import initialise
    from lm.models.ngram import Ngram
    from lm.runs.checkpoint import Checkpoints
    from lm.runs.folder import RunFolder
    from lm.training.train import prepare

    experiment, folder = prepare(config), RunFolder(workdir)
    if isinstance(experiment.model, Ngram):
        params = experiment.model.count(experiment.train.tokens, experiment.train.eos)
    else:
        params = jax.tree.map(lambda x: np.asarray(x) * scale, initialise(experiment.model, config.seed))
    tokenizers.save(experiment.tokenizer, folder.tokenizer)
    folder.write_config(config, experiment.config, experiment.facts)
    with Checkpoints(folder.checkpoints) as checkpoints:
        for step in steps:
            checkpoints.save(step, params, {"step": np.int32(step)}, {"best_step": steps[0], "best_loss": 1.0})
    return workdir


def without_timings(record):
    """A line of metrics, or what is saved as progress, without what differs from one computation to its repetition."""
    return {name: value for name, value in record.items() if name not in ("seconds", "tokens_per_second")}


class WorkersHere:
    """In place of the workers of lm.data.prepare: everything in this process."""

    def __init__(self, tokenizer, number):
        from lm.data import prepare, tokenizers

        del number
        prepare._worker_tokenizer = tokenizers.load(tokenizer)

    def map(self, tasks):
        return (function(*arguments) for function, *arguments in tasks)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Called(NamedTuple):
    """How a verb ended: exit code, what it printed, what it said on standard error."""

    code: int
    out: str
    err: str


_CALLER = """
import gc, json, os, sys, warnings
warnings.simplefilter("ignore")
import launch.console, lm.evaluation.evaluate, lm.evaluation.generate, lm.reporting.report, lm.training.train
import ml_collections.config_flags, orbax.checkpoint, tensorboardX
gc.collect(), gc.freeze()
for number, call in enumerate(json.load(sys.stdin)):
    if os.fork() == 0:
        for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
            stream.flush()
            os.dup2(os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY), stream.fileno())
        import runpy
        sys.argv, code = call, 0
        try:
            runpy.run_module(call[0], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if code and code is not stop.code:
                print(stop.code, file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # taking down all that was imported would cost a second
    code = os.waitstatus_to_exitcode(os.wait()[1])
    print(json.dumps(code), flush=True)
"""


def call_verbs(calls: list[list[str]], folder: pathlib.Path) -> list[Called]:
    """Calls verbs, each in a process of its own that is forked off one that has done the imports: seconds less a call.

    Args:
      calls: module and flags, such as ["launch.train", "--config=x.py"].
      folder: for what they print.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", _CALLER], input=json.dumps(calls), cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    codes = list(map(json.loads, done.stdout.splitlines()))
    return [
        Called(code, *((folder / f"{number}.{stream}").read_text() for stream in ("out", "err")))
        for number, code in enumerate(codes)
    ]
