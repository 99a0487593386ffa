"""From config to model: parameters counted by hand, widths from a budget, roles by path, the effect of every field, no leaks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import NEURAL, ModelConfig
from lm.errors import UserError
from lm.models import build as building
from lm.models.build import build, count_params, initialise, parameter_role, solve_widths
from lm.models.ngram import Ngram

V = 11
GATES = {"rnn": 1, "gru": 3, "lstm": 4, "slstm": 4, "mingru": 2, "minlstm": 3, "mlstm": 4}


def count_by_hand(config, vocab_size):
    """The number of parameters by formula."""
    model = config.model
    if model.architecture in GATES:
        widths = model.layer_dims or (model.hidden_dim,) * model.num_layers
        before = model.embed_dim or widths[-1]
        total = vocab_size * before
        for width in widths:
            gates = 3 if model.input_gate == "coupled" else GATES[model.architecture]
            if model.architecture == "mlstm":
                total += gates * width * (before + 1) + 2 * model.num_heads * (before + 1) + width  # gates of heads, and a norm
            else:
                from_state = width if model.architecture in ("rnn", "gru", "lstm", "slstm") else 0
                total += gates * width * (before + from_state + 1)  # one or two matrices and a bias
            total += width if model.architecture == "gru" else 0  # the candidate's second bias
            before = width
        total += before * model.embed_dim if model.project_output else 0
        if model.mogrifier_rounds:
            total += sum(_mogrifier_by_hand(model, index) for index in range(len(widths)))
    else:
        D, F, before = model.hidden_dim, model.mlp_dim, model.hidden_dim
        norm = {"layer_norm": 2 * D, "rms_norm": D}[model.norm]
        feed_forward = 3 * D * F if model.activation == "swiglu" else 2 * D * F + F + D
        attention = 4 * (D * D + D) + (D * D + 2 * D if model.positions == "relative" else 0)
        attention += 2 * norm // model.num_heads if model.qk_norm else 0
        total = vocab_size * D + model.num_layers * (attention + feed_forward + 2 * norm) + norm
        total += model.max_positions * D if model.positions == "learned" else 0
    if model.num_softmaxes > 1:
        width = model.embed_dim or before
        total += before * model.num_softmaxes * (width + 1) + model.num_softmaxes * width
        before = width
    return total + vocab_size + (0 if model.tie_embeddings else before * vocab_size)


def _mogrifier_by_hand(model, index):
    widths = model.layer_dims or (model.hidden_dim,) * model.num_layers
    before = widths[index - 1] if index else model.embed_dim or widths[-1]
    if model.mogrifier_rank is None:
        return model.mogrifier_rounds * before * widths[index]
    return model.mogrifier_rounds * model.mogrifier_rank * (before + widths[index])


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("rnn", {"model__embed_dim": 6, "model__tie_embeddings": False}),
        ("gru", {}),
        ("gru", {"model__num_layers": 3, "model__layer_dims": (5, 7, 4), "model__embed_dim": 4}),
        ("lstm", {}),
        ("lstm", {"model__input_gate": "coupled", "model__project_output": True, "model__embed_dim": 5}),
        ("lstm", {"model__num_layers": None, "model__layer_dims": (9, 6), "model__embed_dim": 5, "model__tie_embeddings": False}),
        ("lstm", {"model__mogrifier_rounds": 3, "model__layer_dims": (9, 6)}),
        ("lstm", {"model__mogrifier_rounds": 5, "model__mogrifier_rank": 2, "model__embed_dim": 3, "model__num_softmaxes": 4}),
        ("slstm", {"model__layer_dims": (9, 6)}),
        ("mingru", {"model__layer_dims": (9, 6)}),
        ("minlstm", {}),
        ("mlstm", {"model__layer_dims": (8, 6), "model__num_heads": 2}),
        ("rnn", {"model__num_softmaxes": 2, "model__tie_embeddings": False}),
        ("transformer", {"model__num_softmaxes": 3}),
        ("transformer", {"model__positions": "relative", "model__qk_norm": True, "model__num_heads": 2}),
        ("transformer", {}),
        ("transformer", {"model__activation": "swiglu", "model__norm": "rms_norm", "model__tie_embeddings": False}),
        ("transformer", {"model__positions": "learned", "model__max_positions": 13, "model__mlp_dim": 7, "model__num_layers": 3}),
    ],
)
def test_parameters_counted_by_hand(tiny, architecture, fields):
    config = tiny(architecture, **fields)
    assert count_params(config, V) == count_by_hand(config, V)


# --- widths from a budget


BUDGETS = [int(budget) for budget in np.geomspace(1.2e5, 8e7, 23)]
VARIANTS = [
    ("rnn", {}),
    ("gru", {"model__tie_embeddings": False}),
    ("lstm", {"model__num_layers": 3}),
    ("lstm", {"model__embed_dim": 30, "model__tie_embeddings": False}),
    ("transformer", {}),
    ("transformer", {"model__activation": "swiglu", "model__num_heads": 3, "model__norm": "rms_norm"}),
    ("transformer", {"model__activation": "swiglu", "model__num_layers": 5, "model__tie_embeddings": False}),
]


@pytest.mark.parametrize(("architecture", "fields"), VARIANTS)
def test_solved_widths_meet_every_budget(tiny, monkeypatch, architecture, fields):
    """Within 2%, and as near as a whole width allows; counted by the formula, which the test above holds to the model."""
    monkeypatch.setattr(building, "count_params", count_by_hand)
    vocab_size = 400
    for budget in BUDGETS:
        solved = solve_widths(tiny(architecture, model__num_params=budget, **fields), vocab_size)
        model, error = solved.model, abs(count_by_hand(solved, vocab_size) - budget)
        assert error <= 0.02 * budget, (budget, model.hidden_dim)
        if architecture == "transformer":
            assert model.hidden_dim % (2 * model.num_heads) == 0
            wider = dataclasses.replace(model, hidden_dim=model.hidden_dim, mlp_dim=model.mlp_dim + 1)
            per_unit = count_by_hand(_with_model(solved, wider), vocab_size) - count_by_hand(solved, vocab_size)
            assert error <= per_unit / 2
            usual = 8 / 3 if model.activation == "swiglu" else 4
            assert usual * model.hidden_dim <= model.mlp_dim < 3 * usual * model.hidden_dim
        else:
            for neighbour in (model.hidden_dim - 1, model.hidden_dim + 1):
                other = _with_model(solved, dataclasses.replace(model, hidden_dim=neighbour))
                assert error <= abs(count_by_hand(other, vocab_size) - budget)
        assert solve_widths(solved, vocab_size) == solved


def _with_model(config, model):
    return dataclasses.replace(config, model=model)


@pytest.mark.parametrize(("architecture", "fields"), [VARIANTS[2], VARIANTS[5]])
def test_a_solved_width_is_the_models_own_count(tiny, architecture, fields):
    config = solve_widths(tiny(architecture, model__num_params=50_000, **fields), V)
    assert abs(count_params(config, V) / 50_000 - 1) <= 0.02
    leaves = jax.tree.leaves(jax.eval_shape(functools.partial(initialise, build(config, V), 0)))
    assert sum(leaf.size for leaf in leaves) == count_params(config, V)


@pytest.mark.parametrize("architecture", ["lstm", "transformer"])
def test_a_budget_too_small_is_one_clear_sentence(tiny, architecture):
    with pytest.raises(
        UserError, match=rf"config.model.num_params is 30, but the narrowest {architecture} with num_layers=2 .* has \d+ param"
    ):
        solve_widths(tiny(architecture, model__num_params=30), V)


def test_given_widths_are_left_alone(tiny):
    config = tiny("lstm")
    assert solve_widths(config, V) is config


# --- roles and initial values


def roles_of(config):
    shapes = jax.eval_shape(functools.partial(initialise, build(config, V), 0))
    paths = [tuple(key.key for key in path) for path, _ in jax.tree.leaves_with_path(shapes)]
    return {"/".join(path): parameter_role(path) for path in paths}


def test_every_parameter_of_a_recurrent_model_has_its_role(tiny):
    layer = {"input_kernel": "matrix", "recurrent_kernel": "matrix", "bias": "bias", "recurrent_bias": "bias"}
    expected = {f"stack/layer_{i}/{name}": role for i in range(2) for name, role in layer.items()}
    expected |= {"embedding/table": "embedding", "output/bias": "bias", "output/kernel": "output"}
    assert roles_of(tiny("gru", model__tie_embeddings=False)) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_of_a_transformer_has_its_role(tiny, tied):
    """Learned positions, norms with scale and bias, GELU with biases; RMSNorm and SwiGLU have fewer of the same."""
    expected = {"embedding/table": "embedding", "stack/position_table": "embedding", "output/bias": "bias"}
    if not tied:
        expected["output/kernel"] = "output"
    names = [f"attention/{part}" for part in ("query", "key", "value", "outward")]
    names += [f"feed_forward/{part}" for part in ("inward", "outward")]
    for i in range(2):
        for name in names:
            expected |= {f"stack/layer_{i}/{name}/kernel": "matrix", f"stack/layer_{i}/{name}/bias": "bias"}
        for name in ("attention_norm", "feed_forward_norm"):
            expected |= {f"stack/layer_{i}/{name}/scale": "norm", f"stack/layer_{i}/{name}/bias": "bias"}
    expected |= {"stack/last_norm/scale": "norm", "stack/last_norm/bias": "bias"}
    assert roles_of(tiny("transformer", model__positions="learned", model__tie_embeddings=tied)) == expected
    fewer = roles_of(tiny("transformer", model__norm="rms_norm", model__activation="swiglu"))
    gates = {f"stack/layer_{i}/feed_forward/gate/kernel": "matrix" for i in range(2)}
    assert {name: role for name, role in fewer.items() if name not in gates}.items() < (expected | gates).items()
    assert gates.items() < fewer.items()


def initial(config, *seeds):
    """Fresh parameters for each seed."""
    make = jax.jit(functools.partial(initialise, build(config, V)))
    return [jax.tree.map(np.asarray, make(seed)) for seed in seeds]


def test_initial_values_of_a_recurrent_model(tiny):
    fields = {"model__forget_bias": 0.75, "model__embedding_init": "uniform", "model__init_scale": 0.03, "model__hidden_dim": 16}
    (params,) = initial(tiny("lstm", **fields), 0)
    for layer in params["stack"].values():
        np.testing.assert_array_equal(layer["bias"], np.repeat([0, 0.75, 0, 0], 16))
        for gate in np.split(np.asarray(layer["recurrent_kernel"]), 4, axis=1):
            np.testing.assert_allclose(gate.T @ gate, np.eye(16), atol=1e-5)
        assert 0.8 < np.abs(layer["input_kernel"]).max() / (6 / 32) ** 0.5 <= 1
    assert 0.9 < np.abs(params["embedding"]["table"]).max() / 0.03 <= 1
    assert not np.any(params["output"]["bias"])


@pytest.mark.parametrize(
    "architecture, fields, name, blocks",
    [
        ("lstm", dict(model__input_gate="coupled"), "bias", [0.75, 0, 0]),
        ("slstm", {}, "bias", [0, 0.75, 0, 0]),
        ("minlstm", {}, "bias", [0.75, 0, 0]),
    ],
)
def test_only_the_forget_gate_starts_with_a_bias(architecture, fields, name, blocks, tiny):
    (params,) = initial(tiny(architecture, model__forget_bias=0.75, **fields), 0)
    for layer in params["stack"].values():
        np.testing.assert_array_equal(layer[name], np.repeat(blocks, 8))


def test_sinusoidal_positions_stand_beside_a_larger_embedding(tiny):
    """By sqrt(D), as in Vaswani et al. 2017, section 3.4."""
    kinds = ("sinusoidal", "rotary")
    assert [build(tiny("transformer", model__positions=kind), V).embedding.multiplier for kind in kinds] == [8**0.5, 1.0]


def test_initial_values_of_a_transformer(tiny):
    """What each branch adds starts smaller by sqrt(2 * layers); norms start as the identity; the seed decides."""
    fields = {"model__hidden_dim": 64, "model__kernel_init": "normal", "model__init_scale": 0.05, "model__tie_embeddings": False}
    params, other = initial(tiny("transformer", **fields), 0, 1)
    for i in range(2):
        layer = params["stack"][f"layer_{i}"]
        for kernel in (layer["attention"]["query"]["kernel"], layer["feed_forward"]["inward"]["kernel"]):
            np.testing.assert_allclose(np.std(kernel), 0.05, rtol=0.05)
        for kernel in (layer["attention"]["outward"]["kernel"], layer["feed_forward"]["outward"]["kernel"]):
            np.testing.assert_allclose(np.std(kernel), 0.05 / 2, rtol=0.05)
        np.testing.assert_array_equal(layer["attention_norm"]["scale"], np.ones(64))
    np.testing.assert_allclose(np.std(params["output"]["kernel"]), 0.05, rtol=0.1)
    for name in ("query", "key", "value", "outward"):
        kernels = [np.abs(p["stack"][f"layer_{i}"]["attention"][name]["kernel"]).sum() for p in (params, other) for i in range(2)]
        assert len(set(kernels)) == 4  # every layer and every seed its own


# --- every field does something


OTHER_VALUES = {
    "num_params": 3000,
    "num_layers": 3,
    "hidden_dim": 12,
    "layer_dims": (8, 4),
    "embed_dim": 6,
    "tie_embeddings": False,
    "project_output": True,
    "activation": {"rnn": "relu", "transformer": "swiglu"},
    "num_heads": {"transformer": 4, "mlstm": 2},
    "mlp_dim": 9,
    "positions": "sinusoidal",
    "max_positions": 9,
    "attention_window": 2,
    "norm": "rms_norm",
    "dropout_rate": 0.5,
    "embedding_dropout_rate": 0.5,
    "output_dropout_rate": 0.5,
    "attention_dropout_rate": 0.5,
    "word_dropout_rate": 0.5,
    "weight_drop_rate": 0.5,
    "state_dropout_rate": 0.5,
    "variational_dropout": True,
    "kernel_init": "he_normal",
    "recurrent_init": "he_normal",
    "embedding_init": "he_normal",
    "init_scale": 0.2,
    "forget_bias": 2.0,
    "input_gate": "capped",
    "skip_connections": True,
    "num_softmaxes": 2,
    "softmax_dropout_rate": 0.5,
    "cutoffs": (4,),
    "narrowing": 2,
    "qk_norm": True,
    "mogrifier_rounds": 3,
    "mogrifier_rank": 2,
    "scan_layers": True,
    "remat": "full",
}
# Fields that only mean something beside others: what is set on both sides of the comparison.
BESIDE = {
    "embed_dim": {"model__tie_embeddings": False},
    "project_output": {"model__embed_dim": 8},
    "mogrifier_rank": {"model__mogrifier_rounds": 2},
    "softmax_dropout_rate": {"model__num_softmaxes": 2},
    "cutoffs": {"data__tokenizer": "word", "data__vocab_size": V},
    "narrowing": {"data__tokenizer": "word", "data__vocab_size": V, "model__cutoffs": (4,)},
    "max_positions": {"model__positions": "learned"},
    "variational_dropout": {"model__dropout_rate": 0.3},
}
# Fields that take the place of another one.
INSTEAD_OF = {"num_params": "hidden_dim", "layer_dims": "hidden_dim"}


def program(config):
    """What the model does, as JAX traces it: fresh parameters, and a training pass over them, with every constant in it."""
    model = build(solve_widths(config, V), V)

    def run():
        params = initialise(model, 0)
        rngs = {"dropout": jax.random.key(0)}
        tokens = jnp.ones((2, 5), jnp.int32)
        hidden, _ = model.apply({"params": params}, tokens, train=True, rngs=rngs)
        scores = model.apply({"params": params}, hidden, tokens, train=True, rngs=rngs, method="score")
        return params, model.apply({"params": params}, hidden, method="logits"), scores

    traced = jax.make_jaxpr(run)()
    return str(traced.jaxpr), [np.asarray(constant).tobytes() for constant in traced.consts]


@pytest.mark.parametrize("architecture", NEURAL)
def test_every_field_that_applies_changes_the_model(tiny, architecture):
    fields = [
        field for field in dataclasses.fields(ModelConfig) if field.metadata["only"] and architecture in field.metadata["only"]
    ]
    assert {field.name for field in fields} <= set(OTHER_VALUES), "a new field needs a value here"
    plain = program(tiny(architecture))
    assert plain == program(tiny(architecture))
    for field in fields:
        value = OTHER_VALUES[field.name]
        value = value[architecture] if isinstance(value, dict) else value
        beside = BESIDE.get(field.name, {})
        changes = {f"model__{field.name}": value, **beside}
        if field.name in INSTEAD_OF:
            changes[f"model__{INSTEAD_OF[field.name]}"] = None
        before = program(tiny(architecture, **beside)) if beside else plain
        assert program(tiny(architecture, **changes)) != before, field.name


def test_half_precision_is_for_activations_alone(tiny):
    for architecture in ("lstm", "transformer"):
        model = build(tiny(architecture, compute_dtype="bfloat16"), V)
        params = jax.eval_shape(lambda model=model: initialise(model, 0))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

        def run(params, model=model):
            hidden, _ = model.apply({"params": params}, jnp.zeros((2, 3), jnp.int32))
            return hidden, model.apply({"params": params}, hidden, jnp.zeros((2, 3), jnp.int32), method="score").log_prob_BT

        hidden, log_prob = jax.eval_shape(run, params)
        assert (hidden.dtype, log_prob.dtype) == (jnp.bfloat16, jnp.float32)


def test_the_ngram_is_built_with_its_order(tiny):
    assert build(tiny("ngram", model__num_layers=None, model__hidden_dim=None, model__ngram_order=3), V) == Ngram(
        order=3, vocab_size=V
    )


# --- no future leaks


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("rnn", {}),
        ("gru", {}),
        ("lstm", {}),
        ("transformer", {}),
        ("transformer", {"model__positions": "learned", "model__norm": "rms_norm"}),
    ],
)
def test_no_position_depends_on_a_later_one(tiny, random_params, rng, architecture, fields):
    """The gradient of hidden[t] to the embeddings is exactly zero after t, and not zero at t and before."""
    model = build(tiny(architecture, **fields), V)
    stack, params = model.stack, random_params(model)["stack"]
    x, direction = (jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32) for _ in range(2))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def gradient(x, t):
        return jax.grad(lambda x: jnp.sum(stack.apply({"params": params}, x)[0][:, t] * direction[:, t]))(x)

    gradient_TBSD = np.asarray(gradient(x, jnp.arange(6)))
    for t in range(6):
        assert np.all(gradient_TBSD[t, :, t + 1 :] == 0)
        assert np.all(np.any(gradient_TBSD[t, :, : t + 1] != 0, axis=-1))
