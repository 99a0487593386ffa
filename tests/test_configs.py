"""Every experiment of the project trains two shrunken steps, and no field of the config is there for nothing."""

import contextlib
import dataclasses
import pathlib
import random

import pytest

from launch.command import known_configs, load_config
from lm.config import Config, Section, given_fields, recording
from lm.data.prepare import Job, prepare
from lm.data.tfds_text import prepare_text_files
from lm.evaluation.evaluate import evaluate_run
from lm.runs.open import open_run
from lm.training.train import train

ROOT = pathlib.Path(__file__).parent.parent
_read: set[str] = set()  # over all runs of this file
_ran: set[str] = set()  # which of them were run in this process


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few kilobytes of text in a folder of splits, and in one file."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [f"word{i}" for i in range(40)]
    draw = random.Random(0)
    for split, lines in (("train", 400), ("valid", 40), ("test", 40)):
        text = "".join(" ".join(draw.choices(words, k=8)) + "\n" for _ in range(lines))
        (folder / f"{split}.txt").write_text(text)
    (folder / "whole").mkdir()
    (folder / "whole" / "all.txt").write_text((folder / "train.txt").read_text())
    return folder


@contextlib.contextmanager
def fields_read():
    with recording() as reads:
        yield reads
    _read.update(reads)


def run(config: Config, workdir: pathlib.Path) -> set[str]:
    """Trains and scores; returns the fields that were read."""
    with fields_read() as reads:
        train(config, str(workdir))
        assert evaluate_run(open_run(str(workdir)), "valid")["perplexity"] > 1
    return set(reads)


@pytest.mark.parametrize("path", known_configs())
def test_every_config_trains_and_reads_what_it_sets(path, corpus, tmp_path):
    config = load_config(f"{ROOT / path}:runlocal=1", [])
    if config.data.source == "text":
        config.data.path = str(corpus)  # the texts themselves are not part of the project
    elif config.data.source == "tfds":
        pytest.importorskip("tensorflow_datasets")
        prepare_text_files({split: corpus / f"{split}.txt" for split in ("train", "test")}, tmp_path / "datasets")
        config.data.dataset, config.data.path = "text_files", str(tmp_path / "datasets")
        config.data.vocab_size = 280  # there is no text for more
    reads = run(config, tmp_path)
    where_valid_stalls = {"optimizer.decay_factor"} if config.optimizer.schedule == "plateau" else set()  # as in RUNS["lstm"]
    assert given_fields(config) - where_valid_stalls <= reads
    _ran.add(path)


def test_configs_refuse_an_argument_they_do_not_know():
    from lm.errors import UserError

    with pytest.raises(UserError, match="runlocal=1"):
        load_config(f"{ROOT / known_configs()[0]}:runlocl=1", [])


def tiny(corpus, **values) -> Config:
    """A config of a few thousand parameters over the tiny corpus; values as section__field."""
    config = Config()
    config.data.source, config.data.path, config.data.tokenizer = "text", str(corpus), "word"
    config.data.batch_size, config.data.seq_len = 4, 8
    config.training.num_steps, config.training.evaluate_every_steps, config.training.log_every_steps = 2, 1, 1
    for name, value in values.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(config, section) if section else config, field, value)
    return config


# Between them these set every field that an architecture, source or rule has; see the last test.
RUNS = {
    "lstm": dict(
        model__layer_dims=(12, 9),
        model__embed_dim=8,
        model__dropout_rate=0.1,
        model__embedding_dropout_rate=0.1,
        model__output_dropout_rate=0.1,
        model__word_dropout_rate=0.1,
        model__weight_drop_rate=0.1,
        model__variational_dropout=True,
        model__state_dropout_rate=0.1,
        model__forget_bias=1.0,
        model__input_gate="capped",
        model__project_output=True,
        model__mogrifier_rounds=2,
        model__mogrifier_rank=2,
        model__kernel_init="uniform",
        model__recurrent_init="orthogonal",
        model__init_scale=0.05,
        data__vocab_size=30,
        data__min_count=2,
        data__prefetch=0,
        data__seq_len_std=1.0,
        optimizer__name="sgd",
        optimizer__learning_rate=100.0,  # so that valid gets worse and the plateau's rule is asked
        optimizer__schedule="plateau",
        optimizer__decay_factor=0.5,
        optimizer__plateau_patience=0,
        optimizer__weight_decay=1e-5,
        optimizer__decayed="all",
        training__early_stopping=5,
        training__checkpoint_every_steps=1,
        training__activation_penalty=2.0,
        training__temporal_activation_penalty=1.0,
        training__averaging="stall",
        training__averaging_patience=0,
        training__averaging_decay=0.9,
        training__num_micro_batches=2,
        training__on_bad_step="rollback",
        training__spike_nats=3.0,
        seed=3,
        dropout_generator="rbg",
        num_devices=1,
        parallelism="pmap",
    ),
    "rnn": dict(
        model__architecture="rnn",
        model__skip_connections=True,
        model__num_params=2_000,
        model__num_layers=1,
        model__activation="relu",
        model__cutoffs=(20,),
        model__narrowing=2,
        model__tie_embeddings=False,
        optimizer__name="rmsprop",
        optimizer__momentum=0.9,
        optimizer__schedule="step",
        optimizer__decay_start_epoch=1,
        optimizer__decay_factor=0.5,
        optimizer__clip_norm=None,
        optimizer__clip_value=0.1,
        compute_dtype="bfloat16",
        parallelism="sharded",
        mesh_shape=(1, 1, 1),
    ),
    "transformer": dict(
        model__architecture="transformer",
        model__hidden_dim=8,
        model__num_layers=1,
        model__num_heads=2,
        model__mlp_dim=16,
        model__activation="swiglu",
        model__positions="learned",
        model__max_positions=16,
        model__norm="rms_norm",
        model__scan_layers=True,
        model__remat="matmuls",
        model__attention_dropout_rate=0.1,
        model__embedding_init="normal",
        data__order="windows",
        optimizer__name="adamw",
        optimizer__b1=0.8,
        optimizer__b2=0.9,
        optimizer__learning_rate=2e-3,
        optimizer__weight_decay=0.1,
        optimizer__schedule="cosine",
        optimizer__final_fraction=0.2,
        optimizer__warmup_steps=1,
        training__label_smoothing=0.1,
        evaluation__context=8,
        evaluation__stride=4,
        evaluation__rows=4,
    ),
    "streamed transformer": dict(
        model__architecture="transformer",
        model__hidden_dim=8,
        model__num_layers=1,
        model__num_heads=2,
        model__attention_window=8,
        model__positions="relative",
        model__qk_norm=True,
        optimizer__name="muon",
        optimizer__schedule="inverse_sqrt",
    ),
    "mlstm": dict(
        model__num_softmaxes=2, model__architecture="mlstm", model__hidden_dim=8, model__num_heads=2, model__num_layers=1
    ),
    "markov": dict(data__process="markov", data__alphabet_size=3, data__markov_order=1, data__synthetic_seed=1),
    "hidden markov": dict(data__process="hidden_markov", data__alphabet_size=3, data__num_states=2),
    "copy": dict(data__process="copy", data__alphabet_size=3, data__copy_length=3),
    "dyck": dict(data__process="dyck", data__max_depth=3),
    "tfds": dict(
        data__source="tfds",
        data__dataset="text_files",
        data__text_feature="text",
        data__split_expressions=("train[:80%]", "train[80%:90%]", "train[90%:]"),
        data__examples="documents",
        data__order="packed",
    ),
    "ngram": dict(model__architecture="ngram", model__ngram_order=2),
    "mixture": dict(model__hidden_dim=8),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_set_is_read(name, corpus, tmp_path):
    config = tiny(corpus, **RUNS[name])
    if config.data.process:
        config.data.source, config.data.path, config.data.tokenizer = "synthetic", None, "char"
        config.data.num_characters, config.model.hidden_dim = 2_000, 8
    if name == "tfds":
        pytest.importorskip("tensorflow_datasets")
        prepare_text_files({"train": corpus / "train.txt"}, tmp_path / "datasets")
        config.data.path, config.model.hidden_dim = str(tmp_path / "datasets"), 8
    if name == "mixture":
        folder = tmp_path / "prepared"
        prepare(config, folder, Job())
        config.data.prepared, config.data.mixture, config.data.mixture_weights = str(folder), (str(folder),), (0.5, 0.5)
    if name == "ngram":
        config = Config()
        config.data.source, config.data.path, config.data.tokenizer = "text", str(corpus), "byte"
        config.model.architecture, config.model.ngram_order = "ngram", 2
    reads = run(config, tmp_path / "run")
    not_needed = {"data.path"} if config.data.prepared else set()  # where the text stood
    assert given_fields(config) - not_needed <= reads
    _ran.add(name)


def test_no_field_is_unread(corpus, tmp_path):
    """Runs what the others leave open, then asks for every field: one that nothing reads documents a lie."""
    if not {*known_configs(), *RUNS} <= _ran:
        pytest.skip("needs all other tests of this file, in the same process")
    one_file = corpus / "whole" / "all.txt"
    first = tiny(corpus, data__path=str(one_file), data__fractions=(0.8, 0.1, 0.1), data__cache_dir=str(tmp_path / "cache"))
    first.model.hidden_dim = 8
    run(first, tmp_path / "first")
    second = tiny(corpus, data__path=str(one_file), data__fractions=(0.8, 0.1, 0.1), training__init_from=str(tmp_path / "first"))
    second.model.hidden_dim = 8
    run(second, tmp_path / "second")
    assert _all_fields() <= _read, _all_fields() - _read


def _all_fields():
    names = set()
    for section in (Config(), *(value for value in vars(Config()).values() if isinstance(value, Section))):
        prefix = f"{type(section)._section}." if type(section)._section else ""
        names |= {prefix + field.name for field in dataclasses.fields(section)}
    return names
