"""The output layer: scores, losses and their gradients against log_softmax in NumPy, tied and free, whole and in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import log_softmax

from lm.models import output as outputs
from lm.models.output import OutputLayer, loss_sums, score_tokens

B, T, D, V = 2, 3, 5, 7


@pytest.mark.parametrize("tied", [True, False])
def test_scores_and_their_gradient_equal_numpy(rng, tied):
    hidden, table = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    targets, cotangent = rng.integers(0, V, (B, T)), rng.normal(size=(B, T)).astype(np.float32)
    params = {"bias": rng.normal(size=V).astype(np.float32)}
    if not tied:
        params["kernel"] = rng.normal(size=(D, V)).astype(np.float32)
    output = OutputLayer(V, tied, nn.initializers.zeros)

    @jax.jit
    def run(params, hidden, table):
        def log_prob(params, hidden, table):
            scores = output.apply({"params": params}, hidden, targets, table, method="score")
            return scores.log_prob_BT, scores

        value, backward, scores = jax.vjp(log_prob, params, hidden, table, has_aux=True)
        return output.apply({"params": params}, hidden, table, method="logits"), value, scores, backward(cotangent)

    logits, log_prob, scores, (d_params, d_hidden, d_table) = run(params, hidden, table)
    kernel = table.T if tied else params["kernel"]
    want_logits = hidden.astype(np.float64) @ kernel + params["bias"]
    want = log_softmax(want_logits, axis=-1)
    close = dict(rtol=1e-5, atol=3e-6)  # float32 at values of about ten
    np.testing.assert_allclose(logits, want_logits, **close)
    np.testing.assert_allclose(log_prob, np.take_along_axis(want, targets[..., None], axis=-1)[..., 0], **close)
    np.testing.assert_allclose(scores.mean_log_prob_BT, want.mean(axis=-1), **close)
    np.testing.assert_array_equal(scores.correct_BT, want.argmax(axis=-1) == targets)

    d_logits = (np.eye(V)[targets] - np.exp(want)) * cotangent[..., None]
    d_kernel = np.einsum("btd,btv->dv", hidden, d_logits)
    np.testing.assert_allclose(d_hidden, d_logits @ kernel.T, **close)
    np.testing.assert_allclose(d_params["bias"], d_logits.sum(axis=(0, 1)), **close)
    np.testing.assert_allclose(d_table, d_kernel.T if tied else np.zeros((V, D)), **close)
    if not tied:
        np.testing.assert_allclose(d_params["kernel"], d_kernel, **close)


def test_scores_survive_huge_logits():
    """Logits of ten thousand: the likeliest token has log probability 0, the other its distance."""
    output = OutputLayer(2, True, nn.initializers.zeros)
    hidden, table = np.array([[[1e4]]], np.float32), np.array([[1.0], [0.0]], np.float32)
    for target, expected in ((0, 0.0), (1, -1e4)):
        scores = output.apply({"params": {"bias": np.zeros(2, np.float32)}}, hidden, np.array([[target]]), table, method="score")
        np.testing.assert_allclose(scores.log_prob_BT, [[expected]])


WHOLE, PARTS = 1 << 25, 4 * V  # logits at once; the second makes of seven tokens two parts, one of them filled up


@pytest.mark.parametrize("at_once", [WHOLE, PARTS])
@pytest.mark.parametrize("wide", [8192, 1])  # columns beyond which their sums are made as a product
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_losses_and_their_gradient_equal_numpy(rng, monkeypatch, at_once, wide, label_smoothing, tied):
    """Uneven weights, one of them 0; two tokens whose logits tie; the gradient scaled as a loss behind it would."""
    monkeypatch.setattr(outputs, "logits_at_once", lambda: at_once)
    monkeypatch.setattr(outputs, "_WIDE", wide)
    num_tokens = 7
    hidden, kernel = rng.normal(size=(num_tokens, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
    bias, weights = rng.normal(size=V).astype(np.float32), rng.uniform(0.2, 2, num_tokens).astype(np.float32)
    targets = rng.integers(0, V, num_tokens)
    weights[2], hidden[3:5], bias[:3] = 0, 0, 1.5

    def objective(hidden, kernel, bias):
        sums = loss_sums(hidden, kernel.T if tied else kernel, bias, targets, weights, tied, label_smoothing)
        return 2.5 * sums.objective, sums

    gradient, sums = jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))(hidden, kernel, bias)
    log_prob = log_softmax(hidden.astype(np.float64) @ kernel + bias, axis=-1)
    target_NV = (1 - label_smoothing) * np.eye(V)[targets] + label_smoothing / V
    np.testing.assert_allclose(sums.loss, -np.sum(weights * log_prob[np.arange(num_tokens), targets]), rtol=2e-6)
    np.testing.assert_allclose(sums.objective, -np.sum(weights[:, None] * target_NV * log_prob), rtol=2e-6)
    d_logits = 2.5 * weights[:, None] * (np.exp(log_prob) - target_NV)
    for found, want in zip(gradient, (d_logits @ kernel.T, hidden.T @ d_logits, d_logits.sum(axis=0)), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=3e-6)
    undifferentiated = loss_sums(hidden, kernel, bias, targets, weights, False, label_smoothing)
    np.testing.assert_allclose(undifferentiated, sums, rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_losses_in_bfloat16_have_logits_in_float32(rng, tied):
    """Of what is rounded already the loss is exact; of the gradient, what goes into a product is rounded at 2**-9."""
    hidden, kernel = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((50, D), (D, V)))
    bias, weights = rng.normal(size=V).astype(np.float32), rng.uniform(0.2, 2, 50).astype(np.float32)
    targets = rng.integers(0, V, 50)

    def objective(hidden, kernel, bias):
        sums = loss_sums(hidden, kernel.T if tied else kernel, bias, targets, weights, tied, 0.0)
        return sums.objective, sums.loss

    gradient, loss = jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))(hidden, kernel, bias)
    hidden, kernel = (np.asarray(x, np.float64) for x in (hidden, kernel))
    log_prob = log_softmax(hidden @ kernel + bias, axis=-1)
    np.testing.assert_allclose(loss, -np.sum(weights * log_prob[np.arange(50), targets]), rtol=2e-6)
    d_logits = weights[:, None] * (np.exp(log_prob) - np.eye(V)[targets])
    for found, want in zip(gradient, (d_logits @ kernel.T, hidden.T @ d_logits, d_logits.sum(axis=0)), strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), want, atol=2**-7 * np.abs(want).max())


@pytest.mark.parametrize(("numbers", "columns"), [(4 * V, V), (2 * 7, 2), (3, 1)])
def test_scores_in_parts_are_those_of_the_whole(rng, monkeypatch, numbers, columns):
    """Ties among them: the likeliest token is the first of those that are. Parts of four tokens and the whole vocabulary; of all
    and one, with three left over; of three and one."""
    hidden, kernel = np.zeros((7, D), np.float32), rng.normal(size=(D, V)).astype(np.float32)
    hidden[:4] = rng.normal(size=(4, D))
    targets = np.array([1, 5, 2, 0, 0, 1, 6])
    whole = score_tokens(hidden, kernel, np.zeros(V, np.float32), targets, tied=False)
    monkeypatch.setattr(outputs, "logits_at_once", lambda: PARTS)
    monkeypatch.setattr(outputs, "_BLOCK", numbers)
    monkeypatch.setattr(outputs, "_NARROW", columns)
    parts = score_tokens(hidden, kernel, np.zeros(V, np.float32), targets, tied=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, parts)
    np.testing.assert_array_equal(parts.correct_BT[4:], [True, False, False])
