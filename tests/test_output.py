"""The output layer: scores against log_softmax in NumPy, tied and free."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import log_softmax

from lm.models.output import OutputLayer

B, T, D, V = 2, 3, 5, 7


@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_scores_and_their_gradient_equal_numpy(rng, tied, smoothing):
    """Of the targets alone, and together with the mean over the vocabulary."""
    hidden, table = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    targets, cotangent = rng.integers(0, V, (B, T)), rng.normal(size=(B, T)).astype(np.float32)
    mean_cotangent = rng.normal(size=(B, T)).astype(np.float32) * smoothing
    params = {"bias": rng.normal(size=V).astype(np.float32)}
    if not tied:
        params["kernel"] = rng.normal(size=(D, V)).astype(np.float32)
    output = OutputLayer(V, tied, nn.initializers.zeros)

    cotangents = (cotangent, mean_cotangent if smoothing else None)

    @jax.jit
    def run(params, hidden, table):
        def log_prob(params, hidden, table):
            scores = output.apply({"params": params}, hidden, targets, table, method="score")
            return (scores.log_prob_BT, scores.mean_log_prob_BT if smoothing else None), scores

        _, backward, scores = jax.vjp(log_prob, params, hidden, table, has_aux=True)
        return output.apply({"params": params}, hidden, table, method="logits"), scores, backward(cotangents)

    logits, scores, (d_params, d_hidden, d_table) = run(params, hidden, table)
    kernel = table.T if tied else params["kernel"]
    want_logits = hidden.astype(np.float64) @ kernel + params["bias"]
    want = log_softmax(want_logits, axis=-1)
    close = dict(rtol=1e-5, atol=3e-6)  # float32 at values of about ten
    np.testing.assert_allclose(logits, want_logits, **close)
    np.testing.assert_allclose(scores.log_prob_BT, np.take_along_axis(want, targets[..., None], axis=-1)[..., 0], **close)
    np.testing.assert_allclose(scores.mean_log_prob_BT, want.mean(axis=-1), **close)
    np.testing.assert_array_equal(scores.correct_BT, want.argmax(axis=-1) == targets)

    d_logits = (np.eye(V)[targets] - np.exp(want)) * cotangent[..., None]
    d_logits += (1 / V - np.exp(want)) * mean_cotangent[..., None]
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
