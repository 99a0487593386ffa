"""Adaptive embedding and softmax: probabilities, losses and gradients against the formula; what a config may ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import changed, refused
from scipy.special import log_softmax

from lm.config import Config, resolve
from lm.models import output as outputs
from lm.models.adaptive import AdaptiveEmbedding, AdaptiveOutput, clusters
from lm.models.build import solve_widths

B, T, D, V, CUTOFFS = 2, 5, 8, 11, (3, 7)
INIT = nn.initializers.normal(1.0)


@pytest.fixture(params=[(True, 2), (False, 2), (True, 1)], ids=["tied", "free", "of one width"])
def case(request, rng):
    tied, narrowing = request.param
    embedding = AdaptiveEmbedding(V, D, INIT, cutoffs=CUTOFFS, narrowing=narrowing, projection_init=INIT)
    output = AdaptiveOutput(V, tied, D, CUTOFFS, narrowing, INIT, INIT)
    tokens = np.concatenate([np.arange(V), rng.integers(0, V, B * T - V)] if V < B * T else [rng.permutation(V)[: B * T]])
    tokens = tokens.reshape(B, T)
    of_embedding = embedding.init(jax.random.key(0), tokens)["params"]
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    tables = tuple(of_embedding[f"table_{i}"] for i in range(3))
    of_output = output.init(jax.random.key(1), hidden, tables, method="logits")["params"]
    of_output = {**of_output, "bias": rng.normal(size=V).astype(np.float32), "cluster_bias": np.float32([0.3, -1.2])}
    return embedding, output, of_embedding, of_output, tokens, hidden


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def kernel(params, i):
    """Of a cluster's projection; what is not narrower has none."""
    return np.float64(params[f"projection_{i}"]["kernel"]) if f"projection_{i}" in params else np.eye(D)


def log_probs_by_hand(output, of_embedding, of_output, hidden, temperature=1.0):
    """[B, T, V], softmax by softmax."""
    found, tables = float64(of_output), [of_embedding[f"table_{i}"] for i in range(3)]
    if not output.tied:
        tables = [found[f"kernel_{i}"] for i in range(3)]
    first = hidden @ np.concatenate([tables[0], found["cluster_kernel"]]).T
    first = log_softmax((first + np.concatenate([found["bias"][:3], found["cluster_bias"]])) / temperature, axis=-1)
    log_probs = [first[..., :3]]
    for i, (start, end) in enumerate([(3, 7), (7, 11)], 1):
        within = (hidden @ kernel(found, i) @ tables[i].T + found["bias"][start:end]) / temperature
        log_probs.append(first[..., 2 + i : 3 + i] + log_softmax(within, axis=-1))
    return np.concatenate(log_probs, axis=-1)


def test_embeddings_are_projections_of_their_clusters(case):
    embedding, _, params, _, tokens, _ = case
    found, tables = embedding.apply({"params": params}, tokens)
    for place in np.ndindex(tokens.shape):
        cluster = np.searchsorted(CUTOFFS, tokens[place], side="right")
        row = np.float64(params[f"table_{cluster}"][tokens[place] - (0, *CUTOFFS)[cluster]])
        want = row @ kernel(params, cluster) if cluster else row
        np.testing.assert_allclose(found[place], want, rtol=1e-5, atol=1e-5)
    assert [table.shape for table in tables] == (
        [(3, 8), (4, 4), (4, 2)] if embedding.narrowing == 2 else [(3, 8), (4, 8), (4, 8)]
    )
    assert ("projection_1" in params) == (embedding.narrowing == 2)


@pytest.mark.parametrize("at_once, temperature", [(1 << 23, 1.0), (3 * V, 1.0), (1 << 23, 1.6)])
def test_scores_equal_numpy(case, monkeypatch, at_once, temperature):
    _, output, of_embedding, of_output, targets, hidden = case
    monkeypatch.setattr(outputs, "logits_at_once", lambda: at_once)
    tables = tuple(of_embedding[f"table_{i}"] for i in range(3))
    want = log_probs_by_hand(output, of_embedding, of_output, hidden)
    np.testing.assert_allclose(np.exp(want).sum(axis=-1), 1)
    np.testing.assert_allclose(output.apply({"params": of_output}, hidden, tables, method="logits"), want, atol=2e-5)
    want = log_probs_by_hand(output, of_embedding, of_output, hidden, temperature)
    scores = output.apply({"params": of_output}, hidden, targets, tables, temperature, method="score")
    np.testing.assert_allclose(scores.log_prob_BT, np.take_along_axis(want, targets[..., None], axis=-1)[..., 0], atol=2e-5)
    np.testing.assert_array_equal(scores.correct_BT, want.argmax(axis=-1) == targets)
    np.testing.assert_allclose(scores.mean_log_prob_BT, want.mean(axis=-1), atol=2e-5)


def test_losses_and_their_gradient_are_those_of_the_whole_distribution(case, rng):
    """Also the gradient that a tied table has from both ends."""
    embedding, output, of_embedding, of_output, targets, _ = case
    weights, tokens = rng.uniform(0.2, 2, (B, T)).astype(np.float32), rng.permutation(targets.reshape(-1)).reshape(B, T)
    weights[0, 1] = 0

    def ours(of_embedding, of_output):
        hidden, tables = embedding.apply({"params": of_embedding}, tokens)
        sums = output.apply({"params": of_output}, hidden, targets, weights, tables, 0.0, method="loss_sums")
        return sums.objective, sums.loss

    def plainly(of_embedding, of_output):
        hidden, _ = embedding.apply({"params": of_embedding}, tokens)
        tables = tuple(of_embedding[f"table_{i}"] for i in range(3))
        log_probs = output.apply({"params": of_output}, hidden, tables, method="logits")
        return -jnp.sum(jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0] * weights)

    found, loss = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))(of_embedding, of_output)
    want, expected = jax.jit(jax.value_and_grad(plainly, argnums=(0, 1)))(of_embedding, of_output)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=2e-6 * largest), found, expected)


def test_what_clusters_do_not_take_is_refused():
    word = {"data__tokenizer": "word"}
    for fields, words in (
        ({"model__cutoffs": (10,), "data__tokenizer": "char"}, ["config.model.cutoffs", "data.tokenizer='word'"]),
        ({"model__cutoffs": (10, 10), **word}, ["must rise"]),
        ({"model__cutoffs": (10, 20, 30, 40, 50), **word}, ["narrower", "fewer cutoffs"]),
        ({"model__cutoffs": (10,), "model__num_softmaxes": 2, **word}, ["num_softmaxes"]),
        ({"model__cutoffs": (10,), "training__label_smoothing": 0.1, **word}, ["config.training.label_smoothing"]),
        ({"model__narrowing": 2, **word}, ["config.model.cutoffs"]),
    ):
        with refused(*words):
            resolve(changed(Config(), **fields))
    narrow = resolve(changed(Config(), model__cutoffs=(10, 30), model__num_params=300, **word))
    with refused("config.model.cutoffs", "leaves nothing of a width of 3"):
        solve_widths(narrow, 60)
    with refused("config.model.cutoffs is (5, 9)", "9 entries"):
        clusters(9, (5, 9))
    assert clusters(10, (5, 9)) == ((0, 5), (5, 9), (9, 10))
