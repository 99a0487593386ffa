"""PyTorch's example beside our runs: it learns the same text, and the figure over every token is the one of our protocol."""

import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, refused, write_corpus

from lm.benchmark import word_language_model
from lm.benchmark.word_language_model import Settings
from lm.config import DataConfig
from lm.data import sources, tokenizers

SMALL = dict(emsize=8, nhid=8, epochs=3, batch_size=4, bptt=7, dropout=0.1)


@pytest.mark.parametrize("model", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
def test_each_model_learns_and_its_rate_falls_when_valid_does_not(model, tmp_path):
    pytest.importorskip("torch")
    path, told = str(write_corpus(tmp_path / "corpus")), []
    result = word_language_model.train(path, Settings(model=model, lr=5.0, **SMALL), told.append)
    assert told == result["epochs_run"] and [epoch["epoch"] for epoch in told] == [1, 2, 3]
    assert result["perplexity"] < result["vocab_size"] == 19  # seventeen words, <eos> and <unk>
    best = math.inf
    for epoch, after in itertools.pairwise(told):
        better = epoch["valid_perplexity"] < best
        best = min(best, epoch["valid_perplexity"])
        assert after["learning_rate"] == epoch["learning_rate"] / (1 if better else 4)


def test_every_token_is_scored_by_the_epoch_that_was_best(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    path, kept, epochs = str(write_corpus(tmp_path / "corpus")), [], []
    make = word_language_model._model
    monkeypatch.setattr(word_language_model, "_model", lambda *args: kept.append(make(*args)) or kept[-1])
    once = word_language_model.train(path, Settings(**SMALL | {"epochs": 1}))
    train_epoch = word_language_model._train_epoch

    def spoil_later(model, *rest):
        train_epoch(model, *rest)
        if len(epochs) > 0:
            torch.nn.init.uniform_(model.decoder.bias, -9, 9)

    monkeypatch.setattr(word_language_model, "_train_epoch", spoil_later)
    result = word_language_model.train(path, Settings(**SMALL), epochs.append)
    assert result["perplexity"] == once["perplexity"]
    assert epochs[0]["valid_perplexity"] < min(epoch["valid_perplexity"] for epoch in epochs[1:])

    text = (tmp_path / "corpus" / "test.txt").read_text()
    words = text.replace("\n", " <eos> ").split()
    data = DataConfig(source="text", path=path, tokenizer="word", min_count=1)
    vocabulary = tokenizers.train(data, sources.load(data)["train"], tmp_path).ids
    ids = torch.tensor([vocabulary[word] for word in ["<eos>", *words]])
    with torch.no_grad():
        log_probs_NV, _ = kept[-1](ids[:-1, None], None)  # all at once, in one row
    nll_N = -log_probs_NV[np.arange(len(words)), ids[1:]]
    assert result["num_scored"] == len(words)
    assert result["perplexity"] == pytest.approx(math.exp(nll_N.mean()), rel=1e-5)


def test_training_that_diverges_is_told_after_its_epoch(tmp_path):
    pytest.importorskip("torch")
    with refused("not finite after epoch 1", "--lr=1e+30", "smaller"):
        word_language_model.train(str(write_corpus(tmp_path / "corpus")), Settings(model="RNN_RELU", lr=1e30, clip=1e30, **SMALL))


def test_a_text_too_short_for_its_rows_is_refused(tmp_path):
    pytest.importorskip("torch")
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "test.txt").write_text("only a few words\n")
    with refused(f"{corpus / 'test.txt'} has 5 tokens, too few for 10 rows"):
        word_language_model.train(str(corpus), Settings(**SMALL))


def test_a_missing_torch_is_said_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with refused("needs PyTorch", "pip install -e '.[peers]'"):
        word_language_model.train("nowhere", Settings())


def test_the_verb_prints_a_line_an_epoch_and_both_figures(tmp_path):
    pytest.importorskip("torch")
    corpus = write_corpus(tmp_path / "corpus")
    command = [sys.executable, "-m", "launch.word_language_model", f"--data_path={corpus}", "--epochs=2"]
    command += ["--model=RNN_TANH", "--lr=5", f"--json={tmp_path / 'result.json'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (
        done.stdout.count("epoch ") == 2 and f"{result['perplexity']:.2f} of all {result['num_scored']:,} tokens" in done.stdout
    )
    assert result["model"] == "RNN_TANH" and result["num_threads"] == 1
    assert "core" in result["hardware"] and result["date"].endswith(" UTC")
