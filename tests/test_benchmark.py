"""launch.benchmark: operations counted by hand, the peer in PyTorch against our own steps, what is refused, and the verb."""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT, corpus_of, draft, refused, write_corpus

from lm.benchmark import benchmark as benchmarks, peer_side, scan_peer, torch_models, torch_peer
from lm.benchmark.benchmark import benchmark
from lm.benchmark.flops import TRAINING, forward_flops_per_token
from lm.benchmark.machine import Matmul
from lm.benchmark.units import Generation
from lm.benchmark.workers import Worker
from lm.benchmark.workloads import Task, workload
from lm.config import resolve
from lm.data.batches import batches
from lm.errors import UserError
from lm.models.build import build, initialise
from lm.parallel import Placement
from lm.training import optimizer as optimizers
from lm.training.train import Experiment

V = 11


def draft_of(architecture, **fields):
    """A config of two layers of width 8, in steps of 4 × 6 tokens, whose text does not exist."""
    values = {} if architecture == "ngram" else {"model__num_layers": 2}
    if "model__layer_dims" in fields:
        values |= {"model__num_layers": None, "model__hidden_dim": None}
    return draft(pathlib.Path("nowhere"), architecture, **values | {"data__seq_len": 6} | fields)


UNEQUAL = dict(model__layer_dims=(12, 8), model__embed_dim=6, model__tie_embeddings=False)
SWIGLU = dict(model__activation="swiglu", model__norm="rms_norm", model__mlp_dim=20)
ATTENTION, FEED_FORWARD = 4 * 8 * 8, 2 * 8 * 32  # entries of a block's matrices


@pytest.mark.parametrize(
    "architecture, fields, entries, visible_keys",
    [
        ("rnn", UNEQUAL, 6 * 12 + 12 * 12 + 12 * 8 + 8 * 8 + 8 * V, 0),
        ("gru", {}, 2 * (8 + 8) * 3 * 8 + 8 * V, 0),
        ("lstm", {}, 2 * (8 + 8) * 4 * 8 + 8 * V, 0),
        ("transformer", {}, 2 * (ATTENTION + FEED_FORWARD) + 8 * V, (1 + 2 + 3 + 4 + 5 + 6) / 6),
        ("transformer", SWIGLU, 2 * (ATTENTION + 3 * 8 * 20) + 8 * V, 3.5),
        ("transformer", {"model__positions": "learned"}, 2 * (ATTENTION + FEED_FORWARD) + 8 * V, 3.5),
        ("transformer", {"model__attention_window": 2}, 2 * (ATTENTION + FEED_FORWARD) + 8 * V, (1 + 2 + 2 + 2 + 2 + 2) / 6),
        (
            "transformer",
            {"model__attention_window": 9, "data__order": "stream"},
            2 * (ATTENTION + FEED_FORWARD) + 8 * V,
            9,
        ),
    ],
)
def test_operations_of_a_token_are_those_counted_by_hand(architecture, fields, entries, visible_keys):
    expected = 6 * entries + 12 * 2 * 8 * visible_keys
    assert TRAINING * forward_flops_per_token(resolve(draft_of(architecture, **fields)), V) == pytest.approx(expected)


LSTM, OUTPUT, BLOCKS = 2 * 4 * 8 * (8 + 8), 8 * V, 2 * (ATTENTION + FEED_FORWARD)


@pytest.mark.parametrize(
    "architecture, fields, entries, further",
    [
        ("lstm", {"model__num_softmaxes": 3}, LSTM + 8 * 3 + 8 * 3 * 8 + 3 * OUTPUT, 0),  # shares, projections, softmaxes
        # a table of 4 × 8 and one of 7 × 4, that one projected to 8 and back; and the entry of its cluster
        ("lstm", {"model__cutoffs": (4,), "model__narrowing": 2}, LSTM + 4 * 8 + 7 * 4 + 2 * 4 * 8 + 8, 0),
        ("transformer", {"model__positions": "relative"}, BLOCKS + OUTPUT, 6 * 2 * 8 * 3.5),  # distances, too
        ("lstm", {"model__mogrifier_rounds": 3, "model__mogrifier_rank": 2}, LSTM + 2 * 3 * 2 * (8 + 8) + OUTPUT, 0),
        ("mlstm", {"model__num_heads": 2}, 2 * (4 * 8 * 8 + 2 * 8 * 2) + OUTPUT, 2 * 4 * 8 * 4),  # 2 heads of 4 × 4
        ("mingru", {}, 2 * 2 * 8 * 8 + OUTPUT, 0),
    ],
)
def test_operations_of_newer_models_are_those_counted_by_hand(architecture, fields, entries, further):
    config = resolve(draft_of(architecture, data__tokenizer="word", **fields))
    assert forward_flops_per_token(config, V) == pytest.approx(2 * entries + further)


def test_operations_of_a_generated_token_see_the_text_grow():
    config = resolve(draft_of("transformer", model__attention_window=3))
    expected = 2 * (2 * (ATTENTION + FEED_FORWARD) + 8 * V) + 4 * 2 * 8 * (1 + 2 + 3 + 3) / 4
    assert forward_flops_per_token(config, V, carried_length=4) == pytest.approx(expected)


# One simple initialiser for all, larger than usual: quick to compile, and every parameter moves.
UNIFORM = dict(model__kernel_init="uniform", model__embedding_init="uniform", model__init_scale=0.3)
SGD = UNIFORM | dict(optimizer__name="sgd", optimizer__learning_rate=0.5, optimizer__clip_norm=0.1)
RECURRENT = SGD | dict(model__recurrent_init="uniform")
ADAMW = dict(optimizer__name="adamw", optimizer__learning_rate=0.01, optimizer__weight_decay=0.1)


class Eos:
    """As much of a tokenizer as generation needs."""

    eos = 0


def experiment_of(config, corpus):
    return Experiment(config, Eos(), corpus, corpus, build(config, V), {})


@contextlib.contextmanager
def both(config, make_peer, num_units):
    """Ours and a peer after so many training steps from the same parameters; their first losses, without dropout, agree."""
    corpus = corpus_of(np.random.default_rng(0).integers(0, V, 400), V)
    experiment, source = experiment_of(config, corpus), batches(config, corpus)
    trainer = workload("train", experiment, Placement(1), Generation())
    peer = make_peer(config, initialise(experiment.model, config.seed), source)
    with contextlib.closing(trainer), contextlib.closing(peer):
        trainer.run(num_units)
        assert peer.first_loss() == pytest.approx(trainer.first_loss(), abs=1e-6)
        peer.run(num_units)
        yield trainer, peer


def torch_trainer(config, params, source):
    rates = np.asarray(optimizers.build(config, source.steps_per_epoch)[1](np.arange(2)))
    return torch_peer.peer("train", config, V, params, source, rates, Generation())


# AdamW on an RNN: a Transformer's key biases have no gradient but rounding, which Adam would blow up to a full step.
@pytest.mark.parametrize(
    "architecture, fields",
    [
        ("rnn", RECURRENT | UNEQUAL | dict(model__activation="relu")),
        ("rnn", RECURRENT | ADAMW | dict(model__num_layers=1)),
        ("gru", RECURRENT | dict(optimizer__weight_decay=0.1, optimizer__warmup_steps=3)),
        ("lstm", RECURRENT | dict(model__num_layers=1, training__label_smoothing=0.1, optimizer__name="momentum")),
        ("transformer", SGD | SWIGLU | dict(model__num_layers=1, model__attention_window=4, model__tie_embeddings=False)),
    ],
)
def test_first_loss_and_two_updates_are_those_of_the_peer(architecture, fields):
    pytest.importorskip("torch")
    config = resolve(draft_of(architecture, **fields))
    with both(config, torch_trainer, 2) as (trainer, peer):
        ours = torch_models.state_dict(Placement(1).get_state(trainer.state.params), config.model)
        theirs = {name: value.numpy() for name, value in peer.model.state_dict().items()}
    before = torch_models.state_dict(initialise(build(config, V), config.seed), config.model)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, rtol=1e-5, atol=2e-6, err_msg=name)
    moved = [name for name in ours if np.abs(ours[name] - before[name]).max() > 1e-4]
    assert len(moved) >= 0.7 * len(ours), f"only {moved} moved"


@pytest.mark.parametrize(
    "architecture, fields",
    [
        ("gru", RECURRENT),
        ("lstm", RECURRENT | UNEQUAL),
        ("transformer", UNIFORM | dict(model__positions="rotary")),
        ("transformer", UNIFORM | dict(model__positions="sinusoidal", model__attention_window=3, model__activation="relu")),
    ],
)
def test_the_peer_that_generates_carries_what_we_see_at_once(architecture, fields, rng):
    """Token by token through its state, or its keys and values, come the logits that we have for the whole text."""
    torch = pytest.importorskip("torch")
    config, generation = resolve(draft_of(architecture, **fields)), Generation(num_samples=2, num_tokens=9)
    corpus, model = corpus_of(rng.integers(0, V, 400), V), build(config, V)
    params, text_BT = initialise(model, 3), rng.integers(0, V, (2, 9)).astype(np.int32)
    peer = torch_peer.peer("generate", config, V, params, batches(config, corpus), np.ones(1), generation)
    assert peer.sample().shape == (2, 9)
    hidden_BTD = model.apply({"params": params}, text_BT).hidden_BTD
    ours_BTV = model.apply({"params": params}, hidden_BTD, method="logits")
    state = peer.model.empty_state(2)
    for t in range(9):
        logits_BTV, state = peer.model(torch.from_numpy(text_BT[:, t : t + 1]).long(), state)
        np.testing.assert_allclose(logits_BTV[:, 0].detach(), ours_BTV[:, t], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "architecture, fields",
    [
        ("rnn", RECURRENT | UNEQUAL | dict(model__activation="relu")),
        ("gru", RECURRENT | dict(optimizer__weight_decay=0.1, optimizer__warmup_steps=3)),
        ("lstm", RECURRENT | dict(model__num_layers=2)),
    ],
)
def test_first_loss_and_two_updates_are_those_of_a_plain_scan(architecture, fields):
    with both(resolve(draft_of(architecture, **fields)), scan_peer.ScanPeer, 2) as (trainer, peer):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), peer.params, trainer.state.params)


def test_a_plain_scan_drops_states_as_ours_does():
    """The first loss is without dropout, the steps are with it: another rate ends in other parameters."""
    ends = []
    for rate in (0.0, 0.5):
        config = resolve(draft_of("lstm", **RECURRENT, model__state_dropout_rate=rate))
        with both(config, scan_peer.ScanPeer, 2) as (_, peer):
            ends.append(peer.params["stack"]["layer_0"]["recurrent_kernel"])
    assert np.abs(ends[0] - ends[1]).max() > 1e-4  # a hundred times their rounding


@pytest.mark.parametrize(
    "architecture, fields, mode, parts",
    [
        ("lstm", {}, "generate", ["--against=scan measures training, not --mode=generate"]),
        ("transformer", {}, "train", ["'transformer', which is no plain recurrence", "rnn, gru, lstm"]),
        ("lstm", {"model__weight_drop_rate": 0.5}, "train", ["config.model.weight_drop_rate is set", "leave it open"]),
        ("lstm", {"training__label_smoothing": 0.1}, "train", ["config.training.label_smoothing is set"]),
    ],
)
def test_what_a_plain_scan_cannot_do_is_refused(architecture, fields, mode, parts):
    with refused(*parts):
        benchmark(Task(draft_of(architecture, **fields), mode), against="scan")


def test_the_peer_of_awd_lstm_drops_what_ours_drops():
    """Words, locked rows of time and the recurrent matrix: each of them alone, seen in what comes out."""
    torch = pytest.importorskip("torch")
    rates = ["word_dropout_rate", "embedding_dropout_rate", "dropout_rate", "output_dropout_rate", "weight_drop_rate"]
    text_BT = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(0))
    for rate in [None, *rates]:
        fields = {f"model__{name}": 0.5 if name == rate else 0.0 for name in rates}
        config = resolve(draft_of("lstm", **RECURRENT, **UNEQUAL, **fields, model__variational_dropout=True))
        with both(config, torch_trainer, 2) as (_, peer):
            assert peer.model.training
            dropped_BTV, kept_BTV = peer.model(text_BT, None)[0], peer.model.eval()(text_BT, None)[0]
            assert torch.equal(dropped_BTV, kept_BTV) == (rate is None)
    peer.model.train()
    ones_BTD = torch.ones((2, 9, 40))
    locked_BTD = peer.model.drop(ones_BTD, 0.5)
    assert torch.equal(locked_BTD, locked_BTD[:, :1].expand_as(locked_BTD))  # one mask for all steps
    assert not torch.equal(locked_BTD[0], locked_BTD[1]) and set(locked_BTD.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("mode", ["evaluate", "generate"])
def test_first_losses_of_other_modes_are_the_first_training_loss(mode):
    """One model from one seed, whatever is measured of it; units are counted in tokens."""
    config, placement = resolve(draft_of("lstm", **RECURRENT)), Placement(1)
    corpus = corpus_of(np.random.default_rng(0).integers(0, V, 400), V)
    experiment, generation = experiment_of(config, corpus), Generation(num_samples=3, num_tokens=5)
    training, other = (workload(name, experiment, placement, generation) for name in ("train", mode))
    try:
        training.run(1)
        seconds, waited = other.run(2)
        assert 0 <= waited < seconds
        assert other.first_loss() == pytest.approx(training.first_loss(), abs=1e-6)
        assert other.tokens_per_unit == (15 if mode == "generate" else training.tokens_per_unit)
    finally:
        training.close()
        other.close()


class Adder:
    """What a worker holds in the tests below."""

    def __init__(self, start):
        if start < 0:
            raise UserError("start is below 0")
        self.total = start

    def add(self, value):
        if value < 0:
            raise UserError("value is below 0")
        self.total += value
        return self.total

    def variable(self, name):
        return os.environ.get(name)

    def overfill(self):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes")

    def puzzle(self):
        class Odd(Exception):  # as no pickle can hold
            pass

        raise Odd("a and b")

    def die(self):
        os._exit(9)

    def close(self):
        pass


def test_a_worker_keeps_its_object_and_hands_errors_on():
    with Worker(Adder, 1, environment={"LM_TEST_WORKER": "there"}) as worker:
        assert [worker.call("add", 2), worker.call("add", 3)] == [3, 6]
        with refused("value is below 0"):
            worker.call("add", -1)
        with refused("the device's memory ran out"):
            worker.call("overfill")
        assert worker.call("add", 1) == 7
        assert worker.call("variable", "LM_TEST_WORKER") == "there" and "LM_TEST_WORKER" not in os.environ
        with pytest.raises(RuntimeError, match="Odd: a and b"):
            worker.call("puzzle")
        with refused("ended with exit code 9", "what it said stands above"):
            worker.call("die")
    with refused("start is below 0"):
        Worker(Adder, -1)


def test_a_peer_reads_the_batches_of_ours_and_after_the_last_begins_anew(monkeypatch):
    """Eight batches of 24 tokens, of which sixty tokens make two; a state does not go on from the last into the first."""
    monkeypatch.setattr(peer_side, "_MOST_TOKENS", 60)
    corpus = corpus_of(np.arange(200) % V, V)
    source = batches(resolve(draft_of("lstm", data__batch_size=4, data__seq_len=6)), corpus)
    kept = peer_side.Batches(peer_side.Batches.take(source), corpus.eos, source.steps_per_epoch)
    for step, ours in ((0, 0), (1, 1), (2, 0), (3, 1)):
        found, want = kept.batch(step, slice(1, 3)), source.batch(ours, slice(1, 3))
        np.testing.assert_array_equal(found.inputs_BT, want.inputs_BT)
        np.testing.assert_array_equal(found.targets_BT, want.targets_BT)
        assert found.reset_B.tolist() == [ours == 0] * 2


def test_the_process_of_pytorch_loads_no_jax():
    """Its memory is compared with ours."""
    loaded = (
        "import sys, lm.benchmark.peer_side, lm.benchmark.torch_peer; print(sorted({'jax', 'flax', 'optax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_peer_with_another_first_loss_is_refused():
    benchmarks._check_same(2.30001, 2.30009, "torch", "float32")
    benchmarks._check_same(2.3, 2.305, "torch", "bfloat16")
    for theirs, dtype in ((2.3002, "float32"), (float("nan"), "float32"), (2.32, "bfloat16")):
        with refused("the first loss is 2.300000 here", "the two models are not the same"):
            benchmarks._check_same(2.3, theirs, "torch", dtype)


@pytest.mark.parametrize(
    "architecture, fields, parts",
    [
        ("ngram", {}, ["nothing to measure"]),
        ("lstm", {"data__batch_size": 0}, ["config.data.batch_size is 0"]),
        ("lstm", {"num_devices": 999}, ["config.num_devices is 999"]),
        (
            "lstm",
            {"model__dropout_rate": 0.2, "model__state_dropout_rate": 0.5},
            ["no such dropout (lstm)", "set --config.model.state_dropout_rate=0"],
        ),
        ("transformer", {"model__dropout_rate": 0.2}, ["no such dropout (transformer)", "set --config.model.dropout_rate=0"]),
        ("lstm", {"optimizer__name": "lion"}, ["config.optimizer.name is 'lion'", "use one of sgd, momentum, adam, adamw"]),
        ("lstm", {"optimizer__name": "momentum", "optimizer__weight_decay": 0.1}, ["set it to 0 or use adamw"]),
        ("transformer", {"data__order": "stream", "model__attention_window": 4}, ["set --config.data.order=windows"]),
        ("lstm", {"training__num_micro_batches": 2}, ["set --config.training.num_micro_batches=1"]),
        ("lstm", {"model__skip_connections": True}, ["config.model.skip_connections is set", "leave it open"]),
        ("lstm", {"model__input_gate": "coupled"}, ["config.model.input_gate is set", "leave it open"]),
        ("lstm", {"training__activation_penalty": 2.0}, ["config.training.activation_penalty is set", "leave it open"]),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(architecture, fields, parts):
    with refused(*parts):
        benchmark(Task(draft_of(architecture, **fields)), against=None if "num_devices" in fields else "torch")


def test_a_missing_torch_is_said_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with refused("PyTorch", "install the extra: pip install -e '.[peers]'"):
        benchmark(Task(draft_of("lstm")), against="torch")


def test_a_vocabulary_beyond_the_texts_makes_the_model_larger_and_nothing_else(tmp_path):
    text = write_corpus(tmp_path / "corpus")
    plain, wide = (Task(draft(text, "lstm"), vocab_size=size).prepare() for size in (None, 5000))
    size = plain.facts["vocab_size"]
    assert wide.facts["vocab_size"] == 5000 > size
    np.testing.assert_array_equal(wide.train.tokens, plain.train.tokens)
    width = plain.config.model.hidden_dim
    assert wide.facts["num_params"] - plain.facts["num_params"] == (5000 - size) * (width + 1)  # the tied table, and biases
    assert initialise(wide.model, 0)["embedding"]["table"].shape == (5000, width)
    with refused("--vocab_size=3 is smaller than the vocabulary of the text"):
        Task(draft(text, "lstm"), vocab_size=3).prepare()


@pytest.mark.parametrize(
    "mode, compute_dtype, precision",
    [
        ("train", "float32", "default"),
        ("evaluate", "float32", "highest"),
        ("evaluate", "bfloat16", "default"),
        ("generate", "float32", "default"),
    ],
)
def test_the_matmul_is_rounded_as_those_of_what_is_measured(mode, compute_dtype, precision, tmp_path, monkeypatch):
    asked = []

    def matmul(placement, *kind, rows=None, numbers=None):
        asked.append((*kind, rows, numbers))
        return Matmul(placement, *kind, rows=rows, numbers=64)

    monkeypatch.setattr(benchmarks, "Matmul", matmul)
    monkeypatch.setattr(benchmarks, "start", lambda *_, **__: None)  # what it sets would stay for other tests
    sizes = {"matmul": (8, 8, 8)} | ({"few_row_matmul": (3, 4, 16)} if mode == "generate" else {})
    task = Task(draft(write_corpus(tmp_path / "corpus"), "rnn", compute_dtype=compute_dtype), mode, Generation(3, 4))
    with contextlib.closing(benchmarks.OurSide(task, "system", tmp_path)) as ours:
        assert min(ours.matmul_rates().values()) > 0
        facts = ours.facts()
    matmuls = {name: fact for name, fact in facts.items() if name.endswith("matmul")}
    assert {name: (fact["rows"], fact["size"], fact["width"]) for name, fact in matmuls.items()} == sizes
    numbers = round(facts["flops_per_token"] / 2)  # that a token meets
    few = [(compute_dtype, precision, 3, numbers)] if mode == "generate" else []
    assert asked == [(compute_dtype, precision, None, None), *few]


CONFIG = """
import sys, pathlib
sys.path.insert(0, {tests!r})
from helpers import draft

def get_config():
    return draft(pathlib.Path({corpus!r}), "rnn", model__recurrent_init="uniform", model__kernel_init="uniform")
"""
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # of torch, whose threads wait for each other where tests share the cores


@pytest.mark.parametrize("mode", ["train", "evaluate", "generate"])
def test_the_verb_prints_a_few_lines_and_writes_what_it_measured(mode, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    (tmp_path / "tiny.py").write_text(CONFIG.format(tests=str(ROOT / "tests"), corpus=str(corpus)))
    peer = ["--against=torch", "--nocompile_peer"] if importlib.util.find_spec("torch") else []
    command = [sys.executable, "-m", "launch.benchmark", f"--config={tmp_path / 'tiny.py'}", "--steps=3", "--rounds=2", *peer]
    command += ["--allocator=system", "--config.model.hidden_dim=6", f"--json={tmp_path / 'result.json'}", f"--mode={mode}"]
    command += ["--num_tokens=5", f"--profile={tmp_path / 'trace'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("rnn", "system allocator", "first ", "tokens/s", "peak memory", "arithmetic", *(["ratio"] if peer else [])):
        assert word in done.stdout
    assert len(done.stdout.splitlines()) < 14
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))

    result = json.loads((tmp_path / "result.json").read_text())
    assert result["allocator"] == "system" and result["steps"] == 3 and result["busy_cores"] >= 0
    assert result["mode"] == mode and result["tokens_per_step"] == (5 if mode == "generate" else 4 * 8)
    assert result["environment"]["jax"] == jax.__version__ and "launch.benchmark" in result["environment"]["command"]
    assert result["resolved"]["model"]["hidden_dim"] == 6
    assert result["warm_first_step_seconds"] > 0 and 0 <= result["waiting_share"]["median"] < 1
    assert 0 < result["memory"]["host_peak_bytes_before"] <= result["memory"]["host_peak_bytes"]
    speed, matmul = result["tokens_per_second"], result["matmul"]["flops_per_second"]
    assert len(speed["rounds"]) == 2 and speed["min"] <= speed["median"] <= speed["max"]
    assert result["share_of_matmul_peak"] == pytest.approx(result["flops_per_token"] * speed["median"] / matmul)
    few = (
        result["flops_per_token"] * speed["median"] / result["few_row_matmul"]["flops_per_second"] if mode == "generate" else None
    )
    assert result.get("share_of_few_row_matmul_peak") == (few and pytest.approx(few))
    if peer:
        (other,) = result["against"]["allocators"].values()
        assert result["first_loss"] == pytest.approx(other["first_loss"], abs=1e-4)
        pairs = zip(speed["rounds"], other["tokens_per_second"]["rounds"], strict=True)
        assert other["ratio"]["rounds"] == pytest.approx([a / b for a, b in pairs], rel=1e-2)
    else:
        assert result["against"] is None


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="only Linux tells a process's own peak")
def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    child = "from lm.benchmark.units import host_peak_bytes; print(host_peak_bytes())"
    parent = f"import subprocess, sys\nx = b'x' * (300 << 20)\nsubprocess.run([sys.executable, '-c', {child!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 1 << 20 < int(done.stdout) < 200 << 20
