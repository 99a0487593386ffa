"""lm.evaluation.variants: each against its formula, token by token; under names of their own; test only after valid."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import changed, corpus_of, draft, model_and_params, refused, untrained_run, write_corpus

from lm.data import sources
from lm.data.corpus import cache_dir, tokenise
from lm.evaluation.evaluate import evaluate_run
from lm.evaluation.perplexity import Layout, token_losses
from lm.evaluation.scorers import neural_scorer
from lm.evaluation.variants import Cache, Dynamic, Variant, cache_scorer, dropout_scorer, dynamic_scorer, gradient_rms
from lm.parallel import Placement
from lm.runs.open import open_run

VOCAB, EOS = 6, 0
TOKENS = np.random.default_rng(3).integers(0, VOCAB, 23)
CORPUS = corpus_of(TOKENS, VOCAB, EOS)
INPUTS = np.concatenate([[EOS], TOKENS[:-1]])
LOCKED = dict(model__variational_dropout=True, model__dropout_rate=0.3, model__weight_drop_rate=0.3)
MIXTURE = dict(model__num_softmaxes=3, model__softmax_dropout_rate=0.3)


@pytest.fixture(scope="module")
def lstm():
    return model_and_params("lstm", VOCAB, **LOCKED)


def hidden_and_logits(model, params, train=False, **options):
    """Of the whole text at once: [N, D] and [N, V], float64."""

    def logits(model, hidden_BTD):
        return model.output.logits(model.output.read(hidden_BTD, None, train), model.embedding.table)

    output = model.apply({"params": params}, INPUTS[None], model.initial_carry(1), train=train, **options)
    logits = model.apply({"params": params}, output.hidden_BTD, method=logits, **options)
    return np.asarray(output.hidden_BTD[0], np.float64), np.asarray(logits[0], np.float64)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def of_targets(log_probs):
    return log_probs[np.arange(len(TOKENS)), TOKENS]


def nll(scorer, segment=256):
    return token_losses(scorer, CORPUS, Layout(segment=segment))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_a_temperature_divides_the_logits(lstm, temperature):
    model, params = lstm
    found = nll(neural_scorer(model, Placement(1), temperature)(params))
    np.testing.assert_allclose(found, -of_targets(log_softmax(hidden_and_logits(model, params)[1] / temperature)), atol=2e-5)


@pytest.mark.parametrize(("num_samples", "output"), [(1, {}), (20, {}), (5, MIXTURE)], ids=str)
def test_dropout_is_averaged_over_probabilities(num_samples, output):
    """Locked masks stay the same from segment to segment, so that it does not matter how the text is cut."""
    model, params = model_and_params("lstm", VOCAB, **LOCKED, **output)
    samples = [
        of_targets(log_softmax(hidden_and_logits(model, params, train=True, rngs={"dropout": jax.random.key(number)})[1]))
        for number in range(num_samples)
    ]
    assert num_samples == 1 or np.std(samples, axis=0).min() > 1e-3
    wanted = -np.log(np.mean(np.exp(samples), axis=0))
    scorer = dropout_scorer(model, Placement(1), Variant(dropout_samples=num_samples))(params)
    for segment in (256, 5):
        np.testing.assert_allclose(nll(scorer, segment), wanted, atol=2e-5)


@pytest.mark.parametrize("window", [1, 4, 50])
def test_a_cache_adds_what_followed_like_hidden_states(lstm, window):
    """Grave et al. 2017, equations 2 to 4, one token after the other; however the text is cut."""
    model, params = lstm
    cache = Cache(window=window, flatness=0.7, share=0.2)
    hidden, logits = hidden_and_logits(model, params)
    probs, wanted = np.exp(log_softmax(logits)), []
    for now, target in enumerate(TOKENS):
        before = range(max(0, now - window), now)
        weights = np.exp([cache.flatness * hidden[now] @ hidden[i] for i in before])
        found = probs[now, target]
        if len(weights):
            found = (1 - cache.share) * found + cache.share * (weights @ (TOKENS[list(before)] == target)) / weights.sum()
        wanted.append(-np.log(found))
    scorer = cache_scorer(model, Placement(1), Variant(cache=cache))(params)
    for segment in (256, 5, 1):
        np.testing.assert_allclose(nll(scorer, segment), wanted, atol=2e-5)


def mean_loss(model, params, carry, tokens):
    """Of some tokens in a row, and the carry after them; by way of the logits."""
    output = model.apply({"params": params}, INPUTS[None, tokens], carry)
    log_prob = jax.nn.log_softmax(model.apply({"params": params}, output.hidden_BTD, method="logits"))[0]
    nll = -log_prob[np.arange(len(TOKENS[tokens])), TOKENS[tokens]]
    return nll.mean(), (nll, output.carry)


EPSILON = {"sgd": {}, "rms": {"epsilon": 0.01}}


@pytest.mark.parametrize("rule", EPSILON)
def test_dynamic_evaluation_follows_the_text(lstm, rule):
    """Krause et al. 2018, equations 5 to 9, segment after segment; a token is scored before anything learns from it."""
    model, params = lstm
    dynamic = Dynamic(rule, learning_rate=0.05 if rule == "sgd" else 0.01, decay=0.3, segment=4, **EPSILON[rule])
    rng = np.random.default_rng(1)
    rms = jax.tree.map(lambda p: np.float32(0.05 * np.exp(rng.normal(0, 1.5, np.shape(p)))), params)
    every_rms = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(rms)])
    mean_rms = every_rms.mean()
    assert 0.3 * every_rms.max() / mean_rms > 1.5  # more than all the way back: there the way is cut
    now, carry, wanted = params, model.initial_carry(1), []
    gradient = jax.grad(mean_loss, argnums=1, has_aux=True)

    def follow(p, g, start, r):
        p, g, start, r = (np.asarray(x, np.float64) for x in (p, g, start, r))
        if rule == "sgd":
            return np.float32(p - dynamic.learning_rate * g + dynamic.decay * (start - p))
        back = np.minimum(dynamic.decay * r / mean_rms, 1)
        return np.float32(p - dynamic.learning_rate * g / (r + dynamic.epsilon) + back * (start - p))

    for first in range(0, len(TOKENS), 4):
        gradients, (losses, carry) = gradient(model, now, carry, slice(first, first + 4))
        wanted.extend(losses)
        now = jax.tree.map(follow, now, gradients, params, rms)
    variant = Variant(dynamic=dynamic)
    scorer = dynamic_scorer(model, variant, jax.tree.map(jnp.asarray, params), rms)
    static = nll(neural_scorer(model, Placement(1))(params))
    for segment in (variant.segment(256), 8):
        found = nll(scorer, segment)
        np.testing.assert_allclose(found, wanted, atol=5e-5)
    np.testing.assert_allclose(found[:4], static[:4], atol=1e-5)
    assert np.abs(found[4:] - static[4:]).max() > 0.05


def test_without_a_step_dynamic_evaluation_is_static(lstm):
    model, params = lstm
    scorer = dynamic_scorer(model, Variant(dynamic=Dynamic("sgd", learning_rate=0.0)), jax.tree.map(jnp.asarray, params), None)
    np.testing.assert_allclose(nll(scorer, 255), nll(neural_scorer(model, Placement(1))(params)), atol=1e-5)


def test_the_root_mean_square_of_gradients_is_over_batches_of_train(lstm):
    """Of one batch it is the gradient itself, without a sign; of two by hand."""
    model, params = lstm
    told = []
    found = gradient_rms(model, params, CORPUS, 4, told.append)
    rows = np.arange(20).reshape(5, 4)

    def loss(params, carry, tokens, before):
        output = model.apply({"params": params}, before, carry)
        log_prob = jax.nn.log_softmax(model.apply({"params": params}, output.hidden_BTD, method="logits"))
        return -jnp.take_along_axis(log_prob, tokens[..., None], axis=-1).mean(), output.carry

    gradient = jax.grad(loss, has_aux=True)
    only, _ = gradient(params, None, TOKENS[rows], INPUTS[rows])
    assert sum(told) == 20
    jax.tree.map(lambda f, g: np.testing.assert_allclose(f, np.abs(g), atol=1e-5), found, only)

    text = np.tile(TOKENS, 27)[:600]  # a hundred rows of six: two batches of three tokens, the second with what the first left
    before = np.concatenate([[EOS], text[:-1]])
    (tokens, inputs), carry, squares = (x.reshape(100, 6) for x in (text, before)), model.initial_carry(100), []
    for start in (0, 3):
        of_batch, carry = gradient(params, carry, tokens[:, start : start + 3], inputs[:, start : start + 3])
        squares.append(jax.tree.map(lambda g: np.float64(g) ** 2, of_batch))
    found = gradient_rms(model, params, corpus_of(text, VOCAB, EOS), 3)
    jax.tree.map(lambda f, *s: np.testing.assert_allclose(f, np.sqrt(np.mean(s, axis=0)), atol=1e-5), found, *squares)

    with refused("--dynamic_segment=601 is longer than the text"):
        gradient_rms(model, params, corpus_of(text, VOCAB, EOS), 601)


# --- as a figure of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"), train=60, valid=10, test=12)
    config = draft(corpus, model__dropout_rate=0.3)
    return open_run(str(untrained_run(config, tmp_path_factory.mktemp("lstm"), scale=4.0)))


VARIANTS = {
    "dynamic-rms-5e-05-0.002-2e-05-5": Variant(dynamic=Dynamic()),
    "dynamic-sgd-0.3-0.002-5": Variant(dynamic=Dynamic("sgd")),
    "dynamic-sgd-0.5-0.0-7": Variant(dynamic=Dynamic("sgd", 0.5, 0.0, segment=7)),
    "cache-20-0.3-0.1": Variant(cache=Cache(window=20)),
    "dropout-samples-3": Variant(dropout_samples=3),
    "temperature-1.2": Variant(temperature=1.2),
    "dropout-samples-2.temperature-0.9": Variant(dropout_samples=2, temperature=0.9),
}


@pytest.mark.parametrize("ending", VARIANTS)
def test_a_variant_has_a_figure_of_its_own_that_says_what_was_done(run, ending):
    variant, plain = VARIANTS[ending], evaluate_run(run, "valid")
    for text in (None, f"{run.config.data.path}/test.txt"):  # by its file as well
        with refused("test is not for choosing", "--split=valid"):
            evaluate_run(run, "test", text, variant=variant)
    found = evaluate_run(run, "valid", variant=variant)
    assert found["name"] == f"valid.{ending}" and found["loss"] != plain["loss"] and found["tokens"] == plain["tokens"]
    protocol = json.loads((run.folder.evaluation / f"valid.{ending}.json").read_text())["protocol"]
    assert protocol == {**plain["protocol"], "adaptation": variant.adaptation, **variant.protocol}
    assert evaluate_run(run, "valid", variant=variant)["stored"] and evaluate_run(run, "valid")["stored"]
    with refused("test is not for choosing"):  # what valid had with other parameters does not count
        evaluate_run(dataclasses.replace(run, params=jax.tree.map(lambda x: x * 1.5, run.params)), "test", variant=variant)
    assert evaluate_run(run, "test", variant=variant)["name"] == f"test.{ending}"


def test_gradients_of_train_are_kept_for_the_next_settings(run, monkeypatch):
    evaluate_run(run, "valid", variant=Variant(dynamic=Dynamic(segment=6)))
    (kept,) = run.folder.evaluation.glob("gradient_rms.*segment-6.npz")
    train = tokenise(sources.load(run.config.data)["train"], run.tokenizer, cache_dir(run.config.data))
    wanted = flatten_dict(gradient_rms(run.model, run.params, train, 6), sep="/")
    with np.load(kept) as found:
        assert set(found.files) == set(wanted)
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name])
    monkeypatch.setattr("lm.evaluation.evaluate.gradient_rms", lambda *args: pytest.fail("made again"))
    other = Variant(dynamic=Dynamic(segment=6, learning_rate=0.01))
    once = evaluate_run(run, "valid", variant=other)
    monkeypatch.undo()
    kept.write_bytes(b"broken")
    (run.folder.evaluation / f"{once['name']}.json").unlink()
    again = evaluate_run(run, "valid", variant=other)
    assert not again["stored"] and again["loss"] == once["loss"]


def test_settings_that_diverge_are_named_and_not_the_model(run):
    with refused("no finite loss: scored with cache-20-3e+38-0.1 it diverges", "gentler settings"):
        evaluate_run(run, "valid", variant=Variant(cache=Cache(window=20, flatness=3e38)))  # overflows in a product


def test_what_does_not_go_is_refused(run, tmp_path):
    for fields, words in (
        (dict(dynamic=Dynamic(), cache=Cache()), "give one of them"),
        (dict(temperature=0.0), "--temperature=0.0 must be above 0"),
        (dict(temperature=math.inf), "--temperature=inf must be above 0, and finite"),
        (dict(dynamic=Dynamic(epsilon=math.inf)), "--dynamic_epsilon=inf must be above 0, and finite"),
        (dict(dropout_samples=0), "--dropout_samples=0 must be at least 1"),
        (dict(cache=Cache(share=1.0)), "--cache_share=1.0 must be"),
        (dict(dynamic=Dynamic(decay=2.0)), "--dynamic_decay=2.0 must be"),
    ):
        with refused(words):
            Variant(**fields)
    with refused("--dynamic_epsilon is of --dynamic=rms, but --dynamic=sgd is set"):
        Dynamic("sgd", epsilon=0.01)
    for variant in (Variant(dynamic=Dynamic()), Variant(cache=Cache())):
        with refused("follow one stream of text", "windows of 8 tokens"):
            evaluate_run(run, "valid", context=8, variant=variant)
    corpus = run.config.data.path
    dry = open_run(str(untrained_run(changed(draft(tmp_path), data__path=corpus), tmp_path / "dry")))
    with refused("trained without dropout"):
        evaluate_run(dry, "valid", variant=Variant(dropout_samples=2))
    counted = open_run(str(untrained_run(changed(draft(tmp_path, "ngram"), data__path=corpus), tmp_path / "ngram")))
    with refused("an n-gram is scored as it is"):
        evaluate_run(counted, "valid", variant=Variant(temperature=2.0))


def test_dropout_in_windows_is_that_of_each_window_whatever_the_rows():
    model, params = model_and_params("lstm", VOCAB, **LOCKED)
    scorer = dropout_scorer(model, Placement(1), Variant(dropout_samples=2))(params)
    one, three = (token_losses(scorer, CORPUS, Layout(8, 4, rows)) for rows in (1, 3))
    np.testing.assert_allclose(one, three, atol=2e-5)


def test_windows_take_dropout_and_temperature(run):
    for variant in (Variant(dropout_samples=2), Variant(temperature=0.7)):
        assert np.isfinite(evaluate_run(run, "valid", context=8, variant=variant)["loss"])
