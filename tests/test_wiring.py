"""What the config asks for arrives where it belongs: each rate of dropout, penalty and factor set alone and seen in its place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ModelConfig
from lm.data.batches import Batch
from lm.models.build import build
from lm.objectives import causal_language_model
from lm.parallel import Placement
from lm.training import optimizer as optimizers
from lm.training.step import initial_state
from lm.training.train import compile_step

V, D, T = 20, 8, 6
LOCKED = dict(model__variational_dropout=True, model__tie_embeddings=False)
RATES = [field.name for field in dataclasses.fields(ModelConfig) if field.name.endswith("_rate")]


def batch_of(tokens, loss_weights=None):
    """One row, which begins a text; targets are its tokens in turn."""
    tokens_BT = np.asarray([tokens], np.int32)
    weights_BT = np.ones(tokens_BT.shape, np.float32) if loss_weights is None else np.asarray([loss_weights], np.float32)
    return Batch(tokens_BT, np.roll(tokens_BT, 1, axis=1), weights_BT, None, np.ones(1, bool), np.zeros(1, np.int32))


def gradients(config, random_params, tokens):
    """A function (key, train) -> the gradients of the training objective, as the model that is built for a config has it."""
    model = build(config, V)
    params, objective = random_params(model), causal_language_model(model)
    compiled = jax.jit(
        jax.grad(lambda params, key, train: objective(params, None, batch_of(tokens), key, train)[0]["objective"]),
        static_argnums=2,
    )
    return lambda key, train=True: jax.device_get(compiled(params, jax.random.key(key), train))


def places(found):
    """Where a recurrent model's gradients have zeros that say what was dropped, as name -> which."""
    stack = found["stack"]
    seen = {
        "words": np.flatnonzero(~np.any(found["embedding"]["table"][:T], axis=1)),
        "first input": np.flatnonzero(~np.any(stack["layer_0"]["input_kernel"], axis=1)),
        "second input": np.flatnonzero(~np.any(stack["layer_1"]["input_kernel"], axis=1)),
        "output": np.flatnonzero(~np.any(found["output"]["kernel"], axis=1)),
    }
    for name in ("layer_0", "layer_1"):
        kernel = stack[name]["recurrent_kernel"]
        rows = np.flatnonzero(~np.any(kernel, axis=1))
        seen[f"states of {name}"] = rows
        seen[f"weights of {name}"] = np.flatnonzero(np.delete(kernel, rows, axis=0) == 0)
    return {name: tuple(where) for name, where in seen.items() if len(where)}


RECURRENT_PLACES = {
    "word_dropout_rate": {"words"},
    "embedding_dropout_rate": {"first input"},
    "dropout_rate": {"second input"},
    "output_dropout_rate": {"output"},
    "weight_drop_rate": {"weights of layer_0", "weights of layer_1"},
    "state_dropout_rate": {"states of layer_0", "states of layer_1"},
}


@pytest.mark.parametrize("further", [{}, {"model__mogrifier_rounds": 2}], ids=["plain", "mogrifier"])
@pytest.mark.parametrize("rate", RECURRENT_PLACES)
def test_each_rate_of_a_recurrent_model_drops_at_its_place_alone(rate, further, tiny, random_params):
    none = {f"model__{name}": 0.0 for name in RECURRENT_PLACES}
    run = gradients(tiny("lstm", **LOCKED, **none | {f"model__{rate}": 0.5} | further), random_params, range(T))
    one, again, other = (places(run(key)) for key in (1, 1, 2))
    assert set(one) == RECURRENT_PLACES[rate] and one == again
    assert one != other  # another step, another mask
    assert not places(run(1, train=False))


TRANSFORMER_PLACES = {
    "word_dropout_rate": "words",
    "embedding_dropout_rate": "positions",
    "dropout_rate": "branches",
    "attention_dropout_rate": "heads",
}


@pytest.mark.parametrize("rate", TRANSFORMER_PLACES)
def test_each_rate_of_a_transformer_drops_at_its_place_alone(rate, tiny, random_params):
    """Of a text of one token, whose attention is one weight for each head."""
    none = {f"model__{name}": 0.0 for name in TRANSFORMER_PLACES}
    shape = dict(model__num_heads=4, model__positions="learned", model__max_positions=1, data__seq_len=1)
    run = gradients(tiny("transformer", **LOCKED, **none | shape | {f"model__{rate}": 0.5}), random_params, [3])

    def seen(key, train=True):
        found = run(key, train)
        kernels = found["stack"]["layer_0"]["attention"]
        zeros = {
            "words": np.flatnonzero(~np.any(found["embedding"]["table"][3:4], axis=1)),
            "positions": np.flatnonzero(found["stack"]["position_table"][0] == 0),
            "branches": np.flatnonzero(~np.any(kernels["outward"]["kernel"], axis=0)),
            "heads": np.flatnonzero(~np.any(kernels["value"]["kernel"].reshape(D, 4, 2), axis=(0, 2))),
        }
        return {name: tuple(where) for name, where in zeros.items() if len(where)}

    by_key = [seen(key) for key in range(8)]
    assert set().union(*by_key) == {TRANSFORMER_PLACES[rate]} and len({repr(one) for one in by_key}) > 1
    assert by_key[1] == seen(1) and not seen(1, train=False)


def test_adaptive_inputs_drop_words(tiny, random_params):
    config = tiny("lstm", model__cutoffs=(8,), model__word_dropout_rate=0.5, data__tokenizer="word")
    run = gradients(config, random_params, range(T))
    one, again, other, plain = (run(*options)["stack"]["layer_0"]["bias"] for options in ((1,), (1,), (2,), (1, False)))
    np.testing.assert_array_equal(one, again)
    for another in (other, plain):
        assert np.abs(another - one).max() > 1e-3


def test_all_rates_are_looked_at():
    assert set(RATES) == {*RECURRENT_PLACES, *TRANSFORMER_PLACES, "softmax_dropout_rate"}  # the last by test_mixture_output


# --- the compiled step

PLAIN = {"optimizer__name": "sgd", "optimizer__learning_rate": 1.0, "optimizer__clip_norm": None, "data__batch_size": 1}


def stepped(config, random_params, *batches):
    """Parameters before, and the state after a step for each batch, by what `compile_step` makes of a config."""
    model, placement = build(config, V), Placement(1)
    optimizer, _ = optimizers.build(config, steps_per_epoch=10)
    params = jax.device_get(random_params(model))  # the step reuses what it is given
    state = placement.put_state(initial_state(params, optimizer, config.training))
    carry = placement.put_rows(model.initial_carry(1))
    step = compile_step(config, model, optimizer, placement)
    for batch in batches:
        state, carry = step(state, carry, placement.put_rows(batch))
    return params, jax.device_get(state)


def changes(before, after):
    return jax.tree.map(lambda new, old: np.asarray(new, np.float64) - old, after, before)


def test_the_step_has_the_penalties_of_the_config(tiny, random_params):
    alpha, beta = 2.0, 50.0
    config = tiny("lstm", training__activation_penalty=alpha, training__temporal_activation_penalty=beta, **PLAIN)
    params, state = stepped(config, random_params, batch_of(range(T)))

    def mean(params):
        sums, _ = causal_language_model(build(config, V), 0.0, alpha, beta)(
            params, None, batch_of(range(T)), jax.random.key(0), True
        )
        return sums["objective"] / sums["weight"]

    want = jax.grad(mean)(params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        changes(params, state.params),
        jax.tree.map(jnp.negative, want),
    )


def test_a_step_of_random_length_moves_as_far_as_its_share_of_tokens(tiny, random_params):
    """Four of the eight tokens of a row: half of what the same four move where lengths are not random."""
    short = batch_of(range(8), [1, 1, 1, 1, 0, 0, 0, 0])
    moved = []
    for std in (None, 2.0):
        params, state = stepped(tiny("lstm", data__seq_len=8, data__seq_len_std=std, **PLAIN), random_params, short)
        moved.append(changes(params, state.params))
    jax.tree.map(lambda half, whole: np.testing.assert_allclose(2 * half, whole, rtol=1e-4, atol=2e-6), moved[1], moved[0])
    assert np.any(moved[0]["output"]["bias"])


def test_the_mean_of_the_parameters_has_the_decay_of_the_config(tiny, random_params):
    config = tiny("lstm", training__averaging="start", training__averaging_decay=0.25, **PLAIN)
    after = [stepped(config, random_params, *[batch_of(range(T))] * count)[1] for count in (1, 2, 3)]
    mean = after[0].params
    for number, state in enumerate(after[1:], 2):
        weight = min(0.25, 1 - 1 / number)  # the past's
        mean = jax.tree.map(lambda old, new, weight=weight: weight * old + (1 - weight) * new, mean, state.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6), after[-1].averaged_params, mean)
