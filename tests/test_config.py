"""lm.config: what resolve fills in and refuses, the way to JSON and back, and which fields a resumed run may change."""

import dataclasses
import json

import pytest
from helpers import changed, refused

from lm.config import (
    ARCHITECTURES,
    NEURAL,
    RECURRENT,
    Config,
    ModelConfig,
    Section,
    differences,
    from_json,
    given_fields,
    left_open,
    load_resolved,
    recording,
    replaced,
    resolve,
    to_json,
)

TEXT = {"data__source": "text", "data__path": "somewhere"}
RNN, GRU, NGRAM = ({"model__architecture": name} for name in ("rnn", "gru", "ngram"))
TRANSFORMER = {"model__architecture": "transformer", "data__order": "windows"}
LEARNED = {**TRANSFORMER, "model__positions": "learned", "model__max_positions": 32, "data__seq_len": 16}


def made(**fields) -> Config:
    return changed(Config(), **fields)


# fields, and what the one sentence has to name: the field, its value, and what would be right
WRONG = [
    # types
    (dict(model__num_layers="2"), ["config.model.num_layers is '2'", "a whole number", "number of layers"]),
    (dict(model__num_layers=True), ["config.model.num_layers is True", "a whole number"]),
    (dict(model__num_layers=2.0), ["config.model.num_layers is 2.0", "a whole number"]),
    (dict(model__dropout_rate="0.5"), ["config.model.dropout_rate is '0.5'", "a finite number"]),
    (dict(model__dropout_rate=float("nan")), ["config.model.dropout_rate is nan", "a finite number"]),
    (dict(optimizer__learning_rate=float("inf")), ["config.optimizer.learning_rate is inf", "a finite number"]),
    (dict(model__tie_embeddings=1), ["config.model.tie_embeddings is 1", "True or False"]),
    (dict(model__layer_dims=[8, 8]), ["config.model.layer_dims is [8, 8]", "a tuple of whole numbers"]),
    (dict(model__layer_dims=()), ["config.model.layer_dims is ()", "a tuple of whole numbers"]),
    (dict(model__layer_dims=(8, "8")), ["config.model.layer_dims is (8, '8')", "a tuple of whole numbers"]),
    (dict(data__seq_len=None), ["config.data.seq_len is None", "a whole number"]),
    (dict(**TEXT | {"data__path": 3}), ["config.data.path is 3", "a string"]),
    (dict(seed=1.5), ["config.seed is 1.5", "a whole number"]),
    # choices
    (dict(model__architecture="lsmt"), ["config.model.architecture is 'lsmt'", "rnn, gru, lstm", "did you mean 'lstm'?"]),
    (dict(RNN, model__activation="tahn"), ["config.model.activation is 'tahn'", "one of tanh, relu", "did you mean 'tanh'?"]),
    (dict(RNN, model__activation="gelu"), ["config.model.activation is 'gelu'", "one of tanh, relu"]),
    (dict(TRANSFORMER, model__activation="tanh"), ["config.model.activation is 'tanh'", "relu, gelu, gelu_tanh, swiglu"]),
    (dict(model__kernel_init="glorot"), ["config.model.kernel_init is 'glorot'", "xavier_uniform"]),
    (dict(data__source="texts"), ["config.data.source is 'texts'", "did you mean 'text'?"]),
    (dict(data__tokenizer="bytes"), ["config.data.tokenizer is 'bytes'", "did you mean 'byte'?"]),
    (dict(data__order="stroom"), ["config.data.order is 'stroom'", "did you mean 'stream'?"]),
    (dict(optimizer__name="adm"), ["config.optimizer.name is 'adm'", "did you mean 'adam'?"]),
    (dict(optimizer__schedule="cosinus"), ["config.optimizer.schedule is 'cosinus'", "did you mean 'cosine'?"]),
    (dict(mesh_shape=(2, 2, 2)), ["config.mesh_shape is set, but config.parallelism is 'pmap'", "set it to sharded"]),
    (dict(parallelism="sharded", mesh_shape=(2, 2)), ["config.mesh_shape is (2, 2)", "three numbers: data, fsdp and tensor"]),
    (dict(parallelism="sharded", mesh_shape=(2, 0, 2)), ["config.mesh_shape is (2, 0, 2)", "at least 1"]),
    (
        dict(parallelism="sharded", mesh_shape=(2, 2, 2), num_devices=4),
        ["config.num_devices is 4", "config.mesh_shape (2, 2, 2) takes 8", "leave it open"],
    ),
    (dict(parallelism="pmpa"), ["config.parallelism is 'pmpa'", "did you mean 'pmap'?"]),
    (dict(compute_dtype="float16"), ["config.compute_dtype is 'float16'", "float32, bfloat16"]),
    # bounds
    (dict(model__num_layers=0), ["config.model.num_layers is 0", "at least 1"]),
    (dict(model__layer_dims=(8, 0)), ["config.model.layer_dims is (8, 0)", "at least 1"]),
    (dict(model__dropout_rate=1.0), ["config.model.dropout_rate is 1.0", "below 1"]),
    (dict(model__dropout_rate=-0.1), ["config.model.dropout_rate is -0.1", "at least 0"]),
    (dict(model__init_scale=0), ["config.model.init_scale is 0", "above 0"]),
    (dict(optimizer__learning_rate=0.0), ["config.optimizer.learning_rate is 0.0", "above 0"]),
    (dict(optimizer__schedule="cosine", optimizer__final_fraction=1.5), ["optimizer.final_fraction is 1.5", "at most 1"]),
    (dict(optimizer__b1=1.0), ["config.optimizer.b1 is 1.0", "below 1"]),
    (dict(optimizer__clip_norm=0.0), ["config.optimizer.clip_norm is 0.0", "above 0"]),
    (dict(training__num_steps=0), ["config.training.num_steps is 0", "at least 1"]),
    (dict(training__label_smoothing=1.0), ["config.training.label_smoothing is 1.0", "below 1"]),
    (dict(evaluation__rows=0), ["config.evaluation.rows is 0", "at least 1"]),
    (dict(seed=-1), ["config.seed is -1", "at least 0"]),
    (dict(seed=2**32), ["config.seed is 4294967296", "below 4294967296"]),  # JAX would take it for seed 0
    (dict(num_devices=0), ["config.num_devices is 0", "at least 1"]),
    # fields of another architecture
    (dict(model__num_heads=2), ["config.model.num_heads is set", "'lstm'", "belongs to transformer"]),
    (dict(GRU, model__forget_bias=1.0), ["config.model.forget_bias is set", "'gru'", "belongs to lstm"]),
    (dict(GRU, model__activation="tanh"), ["config.model.activation is set", "'gru'", "rnn, transformer"]),
    (dict(TRANSFORMER, model__layer_dims=(8,)), ["config.model.layer_dims is set", "'transformer'", "rnn, gru, lstm"]),
    (dict(TRANSFORMER, model__project_output=False), ["config.model.project_output is set", "rnn, gru, lstm"]),
    (dict(NGRAM, model__hidden_dim=8), ["config.model.hidden_dim is set", "'ngram'"]),
    (dict(model__ngram_order=3), ["config.model.ngram_order is set", "belongs to ngram"]),
    (dict(NGRAM, training__init_from="run"), ["config.training.init_from is set", "n-gram"]),
    (dict(TEXT, data__order="packed"), ["config.data.order is 'packed'", "no document ends", "data.tokenizer='word'"]),
    (dict(data__source="synthetic", data__tokenizer="char", data__order="padded"), ["config.data.order is 'padded'", "windows"]),
    (
        dict(data__source="tfds", data__dataset="lm1b", data__examples="pieces", data__order="padded"),
        ["config.data.order is 'padded'", "no document ends"],
    ),
    # widths
    (dict(model__hidden_dim=8, model__num_params=1000), ["model.num_params", "model.hidden_dim", "set one of them"]),
    (dict(model__hidden_dim=8, model__layer_dims=(8,)), ["model.hidden_dim", "model.layer_dims", "set one of them"]),
    (dict(model__num_params=1000, model__layer_dims=(8,)), ["model.num_params", "model.layer_dims", "set one of them"]),
    (dict(model__num_layers=3, model__layer_dims=(8, 8)), ["config.model.num_layers is 3", "lists 2 widths"]),
    (dict(model__skip_connections=True, model__layer_dims=(8, 4)), ["skip_connections", "(8, 4)", "one width"]),
    (dict(model__embed_dim=4, model__hidden_dim=8), ["tie_embeddings", "config.model.embed_dim is 4", "last layer 8"]),
    (dict(model__embed_dim=8, model__layer_dims=(8, 4)), ["tie_embeddings", "config.model.embed_dim is 8", "last layer 4"]),
    (dict(model__embed_dim=8, model__num_params=1000), ["config.model.embed_dim", "tie_embeddings", "num_params"]),
    (dict(model__project_output=True), ["config.model.project_output", "tie_embeddings=True", "config.model.embed_dim"]),
    (dict(model__input_gate="couple"), ["config.model.input_gate is 'couple'", "did you mean 'coupled'?"]),
    (dict(GRU, model__input_gate="coupled"), ["config.model.input_gate is set", "'gru'", "belongs to lstm"]),
    (dict(TRANSFORMER, training__activation_penalty=1.0), ["training.activation_penalty is set", "rnn, gru, lstm"]),
    # Transformers
    (
        dict(TRANSFORMER, model__hidden_dim=10, model__num_heads=4),
        ["config.model.num_heads is 4", "hidden_dim 10", "hidden_dim 8 would work"],
    ),
    (
        dict(TRANSFORMER, model__hidden_dim=2, model__num_heads=4),
        ["config.model.num_heads is 4", "hidden_dim 2", "hidden_dim 4 would work"],
    ),
    (dict(TRANSFORMER, model__hidden_dim=12, model__num_heads=4), ["model.positions is 'rotary'", "even width", "is 3"]),
    (
        dict(TRANSFORMER, model__positions="sinusoidal", model__hidden_dim=9, model__num_heads=3),
        ["model.positions is 'sinusoidal'", "even hidden_dim", "is 9"],
    ),
    (dict(TRANSFORMER, model__max_positions=64), ["config.model.max_positions is set", "positions='learned'"]),
    (dict(TRANSFORMER, model__num_params=9000, model__mlp_dim=64), ["model.num_params", "model.mlp_dim", "both set"]),
    (
        dict(TRANSFORMER, data__order="stream"),
        ["config.data.order is 'stream'", "config.model.attention_window", "config.data.order='windows'"],
    ),
    (
        dict(LEARNED, data__order="stream", model__attention_window=8),
        ["config.data.order is 'stream'", "positions other than 'learned'"],
    ),
    (dict(LEARNED, data__seq_len=33), ["config.data.seq_len is 33", "learned positions ends at 32"]),
    (dict(LEARNED, evaluation__context=33), ["config.evaluation.context is 33", "learned positions ends at 32"]),
    # data
    (dict(data__source="text"), ["config.data.source is 'text'", "config.data.path is not set"]),
    (dict(data__path="somewhere"), ["config.data.path is set", "config.data.source is 'python_docs'", "belongs to text"]),
    (dict(data__fractions=(0.8, 0.1, 0.1)), ["config.data.fractions is set", "'python_docs'", "belongs to text"]),
    (dict(TEXT, data__fractions=(0.8, 0.1, 0.2)), ["config.data.fractions is (0.8, 0.1, 0.2)", "add up to 1"]),
    (dict(TEXT, data__fractions=(0.9, 0.1)), ["config.data.fractions is (0.9, 0.1)", "three shares"]),
    (dict(TEXT, data__fractions=(0.0, 0.5, 0.5)), ["config.data.fractions is (0.0, 0.5, 0.5)", "three shares"]),
    (dict(TEXT, data__fractions=(0.8, 0.3, -0.1)), ["config.data.fractions is (0.8, 0.3, -0.1)", "at least 0"]),
    (dict(TEXT, data__fractions=(1.2, 0.0, 0.0)), ["config.data.fractions is (1.2, 0.0, 0.0)", "at most 1"]),
    (dict(data__tokenizer="byte", data__vocab_size=300), ["config.data.vocab_size is set", "'byte'", "subword, word"]),
    (dict(data__tokenizer="char", data__min_count=2), ["config.data.min_count is set", "'char'", "belongs to word"]),
    (dict(data__vocab_size=257), ["config.data.vocab_size is 257", "subword", "at least 258"]),
    (dict(data__tokenizer="word", data__vocab_size=2), ["config.data.vocab_size is 2", "word", "at least 3"]),
    (dict(data__seq_len=8, data__seq_len_std=5.0), ["config.data.seq_len_std is 5.0", "half of config.data.seq_len, 8"]),
    # optimisation, training, evaluation
    (dict(optimizer__learning_rate=10**400), ["config.optimizer.learning_rate is 1000", "a finite number"]),
    (dict(optimizer__learning_rate=float("nan")), ["config.optimizer.learning_rate is nan", "a finite number"]),
    (dict(seed=10**400), ["config.seed is 1000", "below 4294967296"]),
    (dict(training__num_steps=2**31), ["config.training.num_steps is 2147483648", "below 2147483648"]),
    (dict(optimizer__clip_value=0.1), ["config.optimizer.clip_norm and config.optimizer.clip_value", "other to None"]),
    (dict(optimizer__final_fraction=0.1), ["config.optimizer.final_fraction is set", "'constant'", "belongs to cosine"]),
    (dict(optimizer__schedule="cosine", optimizer__decay_factor=0.5), ["optimizer.decay_factor is set", "step, plateau"]),
    (dict(optimizer__schedule="plateau", optimizer__decay_start_epoch=2), ["decay_start_epoch is set", "belongs to step"]),
    (dict(optimizer__schedule="step", optimizer__plateau_patience=2), ["plateau_patience is set", "belongs to plateau"]),
    (dict(optimizer__momentum=0.9), ["config.optimizer.momentum is set", "'adam'", "momentum, rmsprop, muon"]),
    (dict(optimizer__name="sgd", optimizer__b2=0.9), ["config.optimizer.b2 is set", "'sgd'", "adam, adamw, lion"]),
    (dict(data__batch_size=6, training__num_micro_batches=4), ["num_micro_batches is 4", "config.data.batch_size 6"]),
    (dict(evaluation__stride=4), ["config.evaluation.stride is set", "config.evaluation.context is None"]),
    (dict(evaluation__context=4, evaluation__stride=5), ["config.evaluation.stride is 5", "window of 4", "left out"]),
]


@pytest.mark.parametrize("fields, parts", WRONG, ids=[f"{', '.join(fields)}: {parts[0]}" for fields, parts in WRONG])
def test_a_wrong_value_is_named_in_one_sentence(fields, parts):
    with refused(*parts):
        resolve(made(**fields))


def test_an_unknown_field_is_named_with_the_nearest_one():
    with refused("config.model.hiden_dim does not exist", "did you mean model.hidden_dim?"):
        Config().model.hiden_dim = 8
    with refused("config.sead does not exist", "did you mean seed?"):
        Config().sead = 8
    with refused("config.evaluation.xyzzy does not exist", "there are: context, stride, rows"):
        Config().evaluation.xyzzy = 8


@pytest.mark.parametrize(
    "fields, filled",
    [
        ({}, dict(model__num_layers=2, model__hidden_dim=256, model__tie_embeddings=True, model__forget_bias=1.0)),
        ({}, dict(data__vocab_size=1000, optimizer__b1=0.9, optimizer__b2=0.999, data__min_count=None, model__activation=None)),
        (dict(model__num_params=1000), dict(model__hidden_dim=None, model__num_params=1000)),
        (dict(model__layer_dims=(8, 4)), dict(model__num_layers=2, model__hidden_dim=None)),
        (
            dict(model__dropout_rate=0.3, model__output_dropout_rate=0.1),
            dict(model__embedding_dropout_rate=0.3, model__output_dropout_rate=0.1, model__attention_dropout_rate=None),
        ),
        (RNN, dict(model__activation="tanh", model__forget_bias=None)),
        (TRANSFORMER, dict(model__mlp_dim=1024, model__positions="rotary", evaluation__context=64, evaluation__stride=16)),
        (dict(TRANSFORMER, model__activation="swiglu", model__hidden_dim=16), dict(model__mlp_dim=43)),  # ceil(16 * 8 / 3)
        (dict(TRANSFORMER, model__dropout_rate=0.3), dict(model__attention_dropout_rate=0.3, model__output_dropout_rate=None)),
        (dict(TRANSFORMER, model__positions="learned"), dict(model__max_positions=1024)),
        (TRANSFORMER, dict(model__remat="none", model__scan_layers=False)),
        (dict(TRANSFORMER, model__remat="full"), dict(model__scan_layers=True)),
        (dict(TRANSFORMER, model__remat="full", model__scan_layers=False), dict(model__scan_layers=False)),
        (dict(TRANSFORMER, data__order="stream", model__attention_window=8), dict(evaluation__context=None)),
        (dict(evaluation__context=2), dict(evaluation__stride=1)),
        (NGRAM, dict(model__ngram_order=5, model__num_layers=None, model__hidden_dim=None)),
        (dict(data__tokenizer="word"), dict(data__vocab_size=None, data__min_count=1)),
        (dict(data__tokenizer="byte"), dict(data__vocab_size=None)),
        (dict(optimizer__schedule="plateau"), dict(optimizer__decay_factor=0.25, optimizer__plateau_patience=0)),
        (dict(optimizer__schedule="step"), dict(optimizer__decay_factor=0.5, optimizer__decay_start_epoch=4)),
        (dict(optimizer__name="lion"), dict(optimizer__b2=0.99, optimizer__momentum=None)),
        (dict(optimizer__clip_norm=None, optimizer__clip_value=0.1), dict(optimizer__clip_norm=None)),
    ],
)
def test_resolve_fills_what_is_left_open(fields, filled):
    draft = made(**fields)
    before = to_json(draft)
    config = resolve(draft)
    assert to_json(draft) == before  # the draft is not touched
    for name, value in filled.items():
        section, _, field = name.partition("__")
        assert getattr(getattr(config, section), field) == value, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_gets_its_own_fields_and_no_others(architecture):
    config = resolve(made(model__architecture=architecture, data__order="windows"))
    without_default = {
        "num_params",
        "hidden_dim",
        "layer_dims",
        "embed_dim",
        "max_positions",
        "attention_window",
        "mogrifier_rank",
        "softmax_dropout_rate",
        "cutoffs",
        "narrowing",
    }
    for field in dataclasses.fields(ModelConfig):
        only, value = field.metadata["only"], getattr(config.model, field.name)
        if only and architecture not in only:
            assert value is None, field.name
        elif field.name not in without_default and not (field.name == "activation" and architecture in ("gru", "lstm")):
            assert value is not None, field.name
        assert left_open("model", field.name).get(architecture, value) == value  # what --help says


def test_a_resolved_config_is_frozen_compared_by_value_and_hashable():
    config, same, other = (resolve(made(seed=seed)) for seed in (1, 1, 2))
    assert config == same and hash(config) == hash(same) and len({config, same, other}) == 2
    assert config != other
    with refused("config.seed cannot be changed"):
        config.seed = 2
    with refused("config.model.hidden_dim cannot be changed"):
        config.model.hidden_dim = 2
    wider = replaced(config, "model", hidden_dim=12)
    assert (wider.model.hidden_dim, config.model.hidden_dim) == (12, 256)
    with refused("config.model.hidden_dim cannot be changed"):
        wider.model.hidden_dim = 2
    draft = made()
    draft.model.hidden_dim = 2  # a draft can be


# between them, every type of field in every group
FULL = [
    dict(
        model__layer_dims=(8, 4),
        model__tie_embeddings=False,
        data__source="text",
        data__path="a/b",
        data__fractions=(0.8, 0.1, 0.1),
        optimizer__schedule="step",
        training__init_from="runs/other",
        training__checkpoint_every_steps=7,
        evaluation__context=8,
        seed=2**32 - 1,
        num_devices=3,
    ),
    dict(LEARNED, compute_dtype="bfloat16"),
    NGRAM,
    {},
]


@pytest.mark.parametrize("fields", FULL)
def test_a_config_comes_back_from_json(fields):
    for config in (made(**fields), resolve(made(**fields))):
        text = json.dumps(to_json(config))
        assert set(to_json(config)) >= {"model", "data", "optimizer", "training", "evaluation", "seed"}
        back = from_json(json.loads(text))
        assert back == config and type(back.data) is type(config.data)
        assert type(back.model.layer_dims) is type(config.model.layer_dims)
    back.seed = 1  # from_json gives a draft
    again = load_resolved(json.loads(text), {})
    assert again == config and hash(again) == hash(config)
    with refused("cannot be changed"):
        again.training.num_steps = 2


def test_json_with_an_unknown_field_is_refused():
    with refused("config.model.hidden_dimension does not exist", "did you mean model.hidden_dim?"):
        from_json({"model": {"hidden_dimension": 8}})
    with refused("config.trainning does not exist", "did you mean training?"):
        from_json({"trainning": {}})


def test_given_fields_are_those_that_differ_from_the_default():
    assert given_fields(Config()) == set()
    assert given_fields(made(**TEXT, seed=0, model__num_layers=2)) == {"data.source", "data.path", "model.num_layers"}


@pytest.mark.parametrize(
    "before, now, sentence",
    [
        ({}, dict(model__hidden_dim=300), "model.hidden_dim: 256 then, 300 now"),
        ({}, dict(seed=1), "seed: 0 then, 1 now"),
        ({}, dict(data__batch_size=16), "data.batch_size: 32 then, 16 now"),
        ({}, dict(data__seq_len=16), "data.seq_len: 64 then, 16 now"),
        ({}, dict(optimizer__learning_rate=1.0), "optimizer.learning_rate: 0.001 then, 1.0 now"),
        ({}, dict(training__num_micro_batches=2), "training.num_micro_batches: 1 then, 2 now"),
        ({}, dict(compute_dtype="bfloat16"), "compute_dtype: float32 then, bfloat16 now"),
        (TEXT, dict(data__path="elsewhere"), None),
        ({}, dict(data__prefetch=0), None),
        ({}, dict(data__cache_dir="elsewhere"), None),
        ({}, dict(training__num_steps=2000), None),
        ({}, dict(training__log_every_steps=1), None),
        ({}, dict(training__checkpoint_every_steps=1), None),
        ({}, dict(evaluation__rows=1), "evaluation.rows: 16 then, 1 now"),  # looks at valid are compared with each other
        ({}, dict(num_devices=2), None),
        (
            dict(optimizer__schedule="cosine"),
            dict(training__num_steps=2000),
            "training.num_steps: 1000 then, 2000 now (a cosine ends with the last step)",
        ),
        (dict(optimizer__schedule="plateau"), dict(training__num_steps=2000), None),
        (dict(NGRAM, optimizer__schedule="cosine"), dict(training__num_steps=2000), None),
    ],
)
def test_differences_names_what_a_resumed_run_may_not_change(before, now, sentence):
    old, new = resolve(made(**before)), resolve(made(**(before | now)))
    assert differences(old, new) == ([sentence] if sentence else [])
    assert differences(old, old) == []


def test_differences_names_all_of_them():
    old, new = resolve(made()), resolve(made(seed=1, model__num_layers=3, data__prefetch=0))
    assert differences(old, new) == ["model.num_layers: 2 then, 3 now", "seed: 0 then, 1 now"]


def test_recording_notes_what_is_read_of_a_resolved_config():
    config, draft = resolve(made()), made()
    with recording() as reads:
        assert reads == set()
        assert config.model.hidden_dim == 256
        assert draft.seed == 0  # a draft is written, not used
        assert reads == {"model", "model.hidden_dim"}
        with recording() as inner:
            assert config.seed == 0
        assert (inner, reads) == ({"seed"}, {"model", "model.hidden_dim"})
        assert hash(config) and to_json(config) and config == config  # carrying it about is not reading it
        assert reads == {"model", "model.hidden_dim"}
    assert config.data.seq_len == 64
    assert reads == {"model", "model.hidden_dim"}


def test_every_field_says_what_it_means():
    for section in [Config(), *(value for value in vars(Config()).values() if isinstance(value, Section))]:
        for field in dataclasses.fields(section):
            if field.metadata:
                assert field.metadata["meaning"].strip(), field.name
                only = field.metadata["only"]
                assert only is None or set(only) <= set(ARCHITECTURES)
    assert set(RECURRENT) < set(NEURAL) < set(ARCHITECTURES)
