"""The mixture of softmaxes: probabilities, losses and gradients against NumPy, whole and in parts, tied and free."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import changed, refused
from scipy.special import log_softmax, logsumexp

from lm.config import Config, resolve
from lm.models import output as outputs
from lm.models.build import build, initialise
from lm.models.mixture import MixtureOutput

B, T, D, E, V, K = 2, 4, 5, 3, 7, 3


def log_probs_by_hand(params, hidden, matrix, temperature=1.0):
    """[B, T, V] from the formula, float64; and its inner values."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    log_prior = log_softmax(hidden @ params["prior"]["kernel"], axis=-1)
    latent = np.tanh(hidden @ params["latent"]["kernel"] + params["latent"]["bias"]).reshape(B, T, K, E)
    components = log_softmax((latent @ matrix + params["bias"]) / temperature, axis=-1)
    return logsumexp(log_prior[..., None] + components, axis=-2)


def run(output, params, method, hidden, *args, rows_B=None, train=False, **options):
    """A method of what the output reads of hidden states."""

    def of_hidden(output):
        return getattr(output, method)(output.read(hidden, rows_B, train), *args)

    return output.apply({"params": params}, method=of_hidden, **options)


@pytest.fixture(params=[True, False], ids=["tied", "free"])
def case(request, rng):
    tied = request.param
    output = MixtureOutput(V, tied, K, E, nn.initializers.normal(1.0), nn.initializers.normal(1.0))
    hidden, table = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, E)).astype(np.float32)
    params = output.init(jax.random.key(0), method=lambda output: output.logits(output.read(hidden), table))["params"]
    params["bias"] = rng.normal(size=V).astype(np.float32)
    params["latent"]["bias"] = rng.normal(size=K * E).astype(np.float32)
    return output, params, hidden, table, rng.integers(0, V, (B, T))


def matrix_of(output, params, table):
    return np.asarray(table.T if output.tied else params["kernel"], np.float64)


@pytest.mark.parametrize("at_once", [1 << 23, 2 * V * (K + 1)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_equal_numpy(case, monkeypatch, at_once, temperature):
    output, params, hidden, table, targets = case
    monkeypatch.setattr(outputs, "logits_at_once", lambda: at_once)
    want = log_probs_by_hand(params, hidden, matrix_of(output, params, table), temperature)
    scores = run(output, params, "score", hidden, targets, table, temperature)
    np.testing.assert_allclose(scores.log_prob_BT, np.take_along_axis(want, targets[..., None], axis=-1)[..., 0], atol=3e-6)
    np.testing.assert_array_equal(scores.correct_BT, want.argmax(axis=-1) == targets)
    np.testing.assert_allclose(scores.mean_log_prob_BT, want.mean(axis=-1), atol=3e-6)
    if temperature == 1.0:
        logits = run(output, params, "logits", hidden, table)
        np.testing.assert_allclose(logits, want, atol=3e-6)
        np.testing.assert_allclose(np.exp(logits).sum(axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("at_once", [1 << 23, 5 * V])
def test_losses_and_their_gradient_are_those_of_the_mixture(case, rng, monkeypatch, at_once):
    """Against the derivative of the whole mixture, made by JAX from the formula in float32; the loss against NumPy."""
    output, params, hidden, table, targets = case
    monkeypatch.setattr(outputs, "logits_at_once", lambda: at_once)
    weights = rng.uniform(0.2, 2, (B, T)).astype(np.float32)
    weights[0, 1] = 0

    def ours(params, hidden, table):
        sums = run(output, params, "loss_sums", hidden, targets, weights, table, 0.0)
        return 2.5 * sums.objective, sums

    def plainly(params, hidden, table):
        log_probs = run(output, params, "logits", hidden, table)
        return -2.5 * jnp.sum(jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0] * weights)

    arguments = params, hidden, table
    found, sums = jax.jit(jax.grad(ours, argnums=(0, 1, 2), has_aux=True))(*arguments)
    expected = jax.jit(jax.grad(plainly, argnums=(0, 1, 2)))(*arguments)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-5), found, expected)
    by_hand = log_probs_by_hand(params, hidden, matrix_of(output, params, table))
    want = -np.sum(np.take_along_axis(by_hand, targets[..., None], axis=-1)[..., 0] * weights)
    np.testing.assert_allclose((sums.loss, sums.objective), want, rtol=2e-6)


@pytest.mark.parametrize("variational", [True, False], ids=["locked", "free"])
def test_dropout_is_of_what_each_softmax_reads(case, rng, variational):
    """Entries are zero or scaled up, for all steps of a row alike if locked; scores and losses are the mixture's of those."""
    output, params, hidden, table, targets = case
    output = output.clone(dropout_rate=0.4, variational=variational)
    weights = rng.uniform(0.2, 2, (B, T)).astype(np.float32)

    rows_B, rngs = jnp.array([3, 5]), {"dropout": jax.random.key(1)}
    dropping = functools.partial(run, rows_B=rows_B, train=True, rngs=rngs)
    (log_prior, whole), (same_prior, dropped) = (
        output.apply({"params": params}, hidden, rows_B, train, method="read", rngs=rngs) for train in (False, True)
    )
    np.testing.assert_array_equal(log_prior, same_prior)
    mask = np.asarray(dropped) != 0
    np.testing.assert_allclose(dropped, np.where(mask, np.asarray(whole) / 0.6, 0), rtol=1e-6)
    assert 0.3 < mask.mean() < 0.9 and np.any(mask[0] != mask[1]) and np.any(mask[:, :, 0] != mask[:, :, 1])
    assert np.all(mask == mask[:, :1]) == variational

    components = log_softmax(np.asarray(dropped, np.float64) @ matrix_of(output, params, table) + params["bias"], axis=-1)
    mixed = logsumexp(np.asarray(log_prior, np.float64)[..., None] + components, axis=-2)
    want = np.take_along_axis(mixed, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(dropping(output, params, "score", hidden, targets, table).log_prob_BT, want, atol=3e-6)
    loss = dropping(output, params, "loss_sums", hidden, targets, weights, table, 0.0).loss
    np.testing.assert_allclose(loss, -np.sum(want * weights), rtol=2e-6)

    def ours(params):
        return dropping(output, params, "loss_sums", hidden, targets, weights, table, 0.0).objective

    def plainly(params):
        return -jnp.sum(dropping(output, params, "score", hidden, targets, table).log_prob_BT * weights)

    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-5), jax.grad(ours)(params), jax.grad(plainly)(params)
    )


def test_a_model_drops_what_its_softmaxes_read_in_training_alone(tiny):
    config = tiny("lstm", model__num_softmaxes=3, model__softmax_dropout_rate=0.5, model__variational_dropout=True)
    model, tokens = build(config, V), jnp.arange(8).reshape(2, 4) % V
    params = initialise(model, 0)

    def loss(train, seed):
        options = {"train": train, "rngs": {"dropout": jax.random.key(seed)}, "method": "loss_sums"}
        return model.apply({"params": params}, tokens, tokens, jnp.ones(tokens.shape), None, **options)[0].loss

    assert loss(False, 0) == loss(False, 1) and loss(True, 0) != loss(True, 1)


def test_what_a_mixture_does_not_take_is_refused():
    mixture = {"model__num_softmaxes": 3}
    with refused("config.training.label_smoothing", "mixture of softmaxes"):
        resolve(changed(Config(), **mixture, training__label_smoothing=0.1))
    with refused("config.model.project_output", "mixture of softmaxes"):
        resolve(changed(Config(), **mixture, model__project_output=True, model__embed_dim=20))
    config = resolve(changed(Config(), **mixture, model__embed_dim=20, model__hidden_dim=30))  # tied, and narrower
    assert config.model.embed_dim == 20
    with refused("config.model.softmax_dropout_rate", "config.model.num_softmaxes"):
        resolve(changed(Config(), model__softmax_dropout_rate=0.1))
    with refused("config.model.mogrifier_rank", "config.model.mogrifier_rounds"):
        resolve(changed(Config(), model__mogrifier_rank=3))
