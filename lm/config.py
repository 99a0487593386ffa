"""A whole experiment as typed dataclasses: the fields with their meanings, validation, and the way to and from JSON.

A config file returns a mutable `Config`; `resolve` checks every value, fills what an architecture leaves open and gives
a frozen copy, which is what everything else reads. Nothing here knows how any of it is carried out.
"""

import contextlib
import copy
import dataclasses
import difflib
import math
import types
import typing

from lm.errors import UserError

RECURRENT = ("rnn", "gru", "lstm")
NEURAL = (*RECURRENT, "transformer")
ARCHITECTURES = (*NEURAL, "ngram")
INITIALIZERS = ("uniform", "normal", "xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "orthogonal")

_reads: set[str] | None = None  # while `recording` is active: every field that was read, as "section.field"


@contextlib.contextmanager
def recording():
    """Notes every field of a frozen config that is read inside the `with`; yields the growing set of "section.field"."""
    global _reads
    before, _reads = _reads, set()
    try:
        yield _reads
    finally:
        _reads = before


def setting(default, meaning, *, choices=None, at_least=None, above=None, at_most=None, below=None, only=None, resumable=False):
    """A dataclass field that carries what a person and `resolve` need to know about it.

    Args:
      default: the value when nothing is said; None in a field of an architecture means "not set".
      meaning: one line, with the unit.
      choices: the allowed strings, or a mapping from architecture to its allowed strings.
      at_least, above, at_most, below: bounds of a number, or of each number of a tuple.
      only: the architectures that the field applies to; setting it for another one is an error.
      resumable: whether a run that is taken up again may change it.
    """
    metadata = dict(
        meaning=meaning,
        choices=choices,
        at_least=at_least,
        above=above,
        at_most=at_most,
        below=below,
        only=only,
        resumable=resumable,
    )
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """Base of the config dataclasses: refuses unknown fields, can be frozen, and is compared and hashed by value."""

    _section = ""

    def __setattr__(self, name, value):
        if self.__dict__.get("_frozen"):
            raise UserError(f"config.{_dotted(self, name)} cannot be changed: this config is already resolved")
        if name not in self.__dataclass_fields__:
            raise UserError(unknown_field(self, name))
        object.__setattr__(self, name, value)

    def __getattribute__(self, name):
        if (
            _reads is not None
            and name in type(self).__dataclass_fields__
            and object.__getattribute__(self, "__dict__").get("_frozen")
        ):
            _reads.add(_dotted(self, name))
        return object.__getattribute__(self, name)

    def _values(self):
        return tuple(vars(self)[field.name] for field in dataclasses.fields(self))

    def __eq__(self, other):
        return type(self) is type(other) and self._values() == other._values()

    def __hash__(self):
        return hash((type(self), self._values()))


def _dotted(section, name):
    prefix = type(section)._section
    return f"{prefix}.{name}" if prefix else name


def unknown_field(section, name) -> str:
    """The sentence for a field that does not exist, with the nearest one that does."""
    names = [field.name for field in dataclasses.fields(section)]
    near = difflib.get_close_matches(name, names, 1)
    return f"config.{_dotted(section, name)} does not exist; " + (
        f"did you mean {_dotted(section, near[0])}?" if near else f"there are: {', '.join(names)}"
    )


@dataclasses.dataclass(eq=False)
class ModelConfig(Section):
    _section: typing.ClassVar = "model"
    architecture: str = setting("lstm", "which model", choices=ARCHITECTURES)
    num_params: int | None = setting(
        None, "budget of parameters, embeddings and output counted; the width is solved from it", at_least=1, only=NEURAL
    )
    num_layers: int | None = setting(None, "number of layers", at_least=1, only=NEURAL)
    hidden_dim: int | None = setting(None, "width of every recurrent layer, or of the Transformer", at_least=1, only=NEURAL)
    layer_dims: tuple[int, ...] | None = setting(None, "width of each recurrent layer, one by one", at_least=1, only=RECURRENT)
    embed_dim: int | None = setting(None, "width of the embedding; by default that of the last layer", at_least=1, only=RECURRENT)
    tie_embeddings: bool | None = setting(None, "whether the output uses the embedding's table", only=NEURAL)
    project_output: bool | None = setting(
        None, "whether a matrix leads from the last layer to a tied embedding of another width, embed_dim", only=RECURRENT
    )
    activation: str | None = setting(
        None,
        "non-linearity of the RNN's state or of the Transformer's feed-forward layer (gelu is the exact one)",
        choices={"rnn": ("tanh", "relu"), "transformer": ("gelu", "gelu_tanh", "swiglu")},
        only=("rnn", "transformer"),
    )
    num_heads: int | None = setting(None, "attention heads; they divide hidden_dim", at_least=1, only=("transformer",))
    mlp_dim: int | None = setting(None, "width of the feed-forward layer", at_least=1, only=("transformer",))
    positions: str | None = setting(
        None, "how positions are told apart", choices=("learned", "sinusoidal", "rotary"), only=("transformer",)
    )
    max_positions: int | None = setting(
        None, "rows of the table of learned positions, in tokens", at_least=1, only=("transformer",)
    )
    attention_window: int | None = setting(
        None, "positions a token may see, itself included; None: all of its text", at_least=1, only=("transformer",)
    )
    norm: str | None = setting(None, "normalisation", choices=("layer_norm", "rms_norm"), only=("transformer",))
    dropout_rate: float | None = setting(
        None, "share dropped between recurrent layers, or on a Transformer's residual branches", at_least=0, below=1, only=NEURAL
    )
    embedding_dropout_rate: float | None = setting(
        None, "share dropped of the embedding's output; by default dropout_rate", at_least=0, below=1, only=NEURAL
    )
    output_dropout_rate: float | None = setting(
        None, "share dropped of the last layer's output; by default dropout_rate", at_least=0, below=1, only=RECURRENT
    )
    attention_dropout_rate: float | None = setting(
        None, "share dropped of the attention weights; by default dropout_rate", at_least=0, below=1, only=("transformer",)
    )
    word_dropout_rate: float | None = setting(
        None, "share of the vocabulary whose embeddings are dropped whole", at_least=0, below=1, only=NEURAL
    )
    weight_drop_rate: float | None = setting(
        None, "share dropped of the recurrent matrices' entries", at_least=0, below=1, only=RECURRENT
    )
    state_dropout_rate: float | None = setting(
        None,
        "share dropped of the hidden state where it enters the next step, one mask for all steps of a segment",
        at_least=0,
        below=1,
        only=RECURRENT,
    )
    variational_dropout: bool | None = setting(None, "one dropout mask for all steps of a segment", only=RECURRENT)
    kernel_init: str | None = setting(None, "initialiser of the matrices", choices=INITIALIZERS, only=NEURAL)
    recurrent_init: str | None = setting(None, "initialiser of the state-to-state matrices", choices=INITIALIZERS, only=RECURRENT)
    embedding_init: str | None = setting(
        None, "initialiser of embedding, learned positions and free output", choices=INITIALIZERS, only=NEURAL
    )
    init_scale: float | None = setting(
        None, "half-width of uniform and standard deviation of normal initialisers", above=0, only=NEURAL
    )
    forget_bias: float | None = setting(None, "initial bias of the forget gate", only=("lstm",))
    input_gate: str | None = setting(
        None,
        "the input gate i beside the forget gate f: free, coupled (i = 1 - f) or capped (i at most 1 - f)",
        choices=("free", "coupled", "capped"),
        only=("lstm",),
    )
    scan_layers: bool | None = setting(
        None, "run all layers by one compiled loop; by default where remat is on", only=("transformer",), resumable=True
    )
    remat: str | None = setting(
        None,
        "what the backward pass makes again instead of keeping it: nothing, all but the matmuls' results, or whole layers",
        choices=("none", "matmuls", "full"),
        only=("transformer",),
        resumable=True,
    )
    ngram_order: int | None = setting(None, "longest n-gram, in tokens (5: four tokens of context)", at_least=1, only=("ngram",))


@dataclasses.dataclass(eq=False)
class DataConfig(Section):
    _section: typing.ClassVar = "data"
    source: str = setting("python_docs", "where the text comes from", choices=("python_docs", "text", "tfds", "synthetic"))
    path: str | None = setting(
        None,
        "text: a folder with train, valid and test files, or one file to be split (.gz too); tfds: the folder that datasets are "
        "kept in, or that of one prepared version",
        resumable=True,
    )
    fractions: tuple[float, ...] | None = setting(
        None, "text, one file: shares of train, valid and test, by characters, in this order", at_least=0, at_most=1
    )
    dataset: str | None = setting(None, "tfds: a name such as lm1b, or wiki40b/en:1.3.0")
    text_feature: str | None = setting(None, "tfds: the feature that is read; by default text, or the only text there is")
    split_expressions: tuple[str, ...] | None = setting(
        None, "tfds: train, valid and test as split expressions; by default the dataset's own splits"
    )
    examples: str | None = setting(
        None,
        "tfds: documents: each example ends in <eos>; pieces: they are joined as they stand, as from one text file",
        choices=("documents", "pieces"),
    )
    process: str | None = setting(
        None,
        "synthetic: what draws the text (lm/data/synthetic.py says how)",
        choices=("markov", "hidden_markov", "copy", "dyck"),
    )
    num_characters: int | None = setting(
        None, "synthetic: characters of train; valid and test have a tenth of that each", at_least=10
    )
    synthetic_seed: int | None = setting(None, "synthetic: seed of the process and of its text", at_least=0, below=2**32)
    alphabet_size: int | None = setting(None, "markov, hidden_markov, copy: different letters", at_least=2, at_most=26)
    markov_order: int | None = setting(None, "markov: letters that the next one depends on", at_least=1)
    num_states: int | None = setting(None, "hidden_markov: hidden states", at_least=1, at_most=64)
    copy_length: int | None = setting(None, "copy: letters to be copied", at_least=1)
    max_depth: int | None = setting(None, "dyck: brackets open at once, at most", at_least=1)
    tokenizer: str = setting("subword", "unit of the text", choices=("byte", "char", "word", "subword"))
    vocab_size: int | None = setting(
        None, "entries of the vocabulary: exact for subword, at most for word, <eos> and <unk> counted", at_least=1
    )
    min_count: int | None = setting(None, "word: occurrences in train below which a word becomes <unk>", at_least=1)
    order: str = setting(
        "stream",
        "stream: contiguous rows, state carried from step to step; windows: shuffled, each starting empty; packed: such windows "
        "in which no document sees another; padded: a document a row (a document ends with <eos>)",
        choices=("stream", "windows", "packed", "padded"),
    )
    seq_len: int = setting(64, "tokens of a row in one step", at_least=1)
    batch_size: int = setting(32, "rows of a step over all devices", at_least=1)
    prefetch: int = setting(2, "batches made and put on the device ahead of time", at_least=0, resumable=True)
    cache_dir: str | None = setting(None, "folder of the token cache; by default lm in the user's cache folder", resumable=True)
    prepared: str | None = setting(
        None, "a folder made by launch.prepare_data from this config, whose tokens are read in place of the text", resumable=True
    )
    mixture: tuple[str, ...] | None = setting(
        None, "further such folders, of the same tokenizer, whose train tokens are mixed into these", resumable=True
    )
    mixture_weights: tuple[float, ...] | None = setting(
        None, "shares of training tokens: of the config's own text, then of each of the mixture", above=0, below=1
    )


@dataclasses.dataclass(eq=False)
class OptimizerConfig(Section):
    _section: typing.ClassVar = "optimizer"
    name: str = setting(
        "adam",
        "update rule",
        choices=("sgd", "momentum", "rmsprop", "adam", "adamw", "adafactor", "lion", "muon"),
    )
    learning_rate: float = setting(1e-3, "peak step size", above=0)
    schedule: str = setting(
        "constant",
        "how the learning rate changes after warm-up",
        choices=("constant", "cosine", "inverse_sqrt", "step", "plateau"),
    )
    warmup_steps: int = setting(0, "steps of linear warm-up", at_least=0)
    final_fraction: float | None = setting(None, "cosine: share of learning_rate left at num_steps", at_least=0, at_most=1)
    decay_factor: float | None = setting(
        None, "step, plateau: factor on the learning rate, each epoch or each stall of valid", above=0, below=1
    )
    decay_start_epoch: int | None = setting(None, "step: epochs at the full learning rate", at_least=0)
    plateau_patience: int | None = setting(None, "plateau: evaluations without improvement before a decay", at_least=0)
    weight_decay: float | None = setting(
        None, "decay of the matrices per unit of learning rate; by default 0.01 for adamw, else 0", at_least=0
    )
    clip_norm: float | None = setting(1.0, "largest global norm of the gradient; None: no such clipping", above=0)
    clip_value: float | None = setting(None, "largest absolute value of a gradient entry, instead of clip_norm", above=0)
    momentum: float | None = setting(None, "momentum, muon: decay of the velocity; rmsprop: of the squares", at_least=0, below=1)
    b1: float | None = setting(None, "adam, adamw, lion, muon's adam: decay of the first moment", at_least=0, below=1)
    b2: float | None = setting(None, "adam, adamw, lion, muon's adam: decay of the second moment", at_least=0, below=1)
    adam_learning_rate: float | None = setting(
        None, "muon: peak step size of adam on all that is no matrix; by default learning_rate", above=0
    )


@dataclasses.dataclass(eq=False)
class TrainingConfig(Section):
    _section: typing.ClassVar = "training"
    num_steps: int = setting(1000, "updates in all", at_least=1, resumable=True)
    num_micro_batches: int = setting(1, "parts that a step's rows are cut into, their gradients added", at_least=1)
    label_smoothing: float = setting(0.0, "share of the target spread over the vocabulary (objective only)", at_least=0, below=1)
    activation_penalty: float | None = setting(
        None,
        "AR: factor on the mean square of the last layer's output after dropout (objective only)",
        at_least=0,
        only=RECURRENT,
    )
    temporal_activation_penalty: float | None = setting(
        None,
        "TAR: factor on the mean square of the change of the last layer's output from token to token, before dropout "
        "(objective only)",
        at_least=0,
        only=RECURRENT,
    )
    log_every_steps: int = setting(50, "steps between lines of metrics", at_least=1, resumable=True)
    evaluate_every_steps: int = setting(
        200, "steps between looks at valid, each followed by a checkpoint", at_least=1, resumable=True
    )
    checkpoint_every_steps: int | None = setting(
        None, "steps between further checkpoints; None: only after evaluations", at_least=1, resumable=True
    )
    on_bad_step: str = setting(
        "stop",
        "after a step with a non-finite loss, gradient or update: end the run, leave the update out, or go back to the last "
        "checkpoint and leave the batch out",
        choices=("stop", "skip", "rollback"),
    )
    spike_nats: float | None = setting(
        None, "a step is bad, too, whose loss lies so many nats per token above the recent mean; None: never", above=0
    )
    early_stopping: int | None = setting(None, "evaluations without improvement after which training ends", at_least=1)
    init_from: str | None = setting(None, "workdir of a run whose best parameters are the start")


@dataclasses.dataclass(eq=False)
class EvaluationConfig(Section):
    _section: typing.ClassVar = "evaluation"
    context: int | None = setting(
        None, "tokens of a window; None: state is carried through the whole split in one stream", at_least=1, resumable=True
    )
    stride: int | None = setting(None, "tokens scored in each window after the first", at_least=1, resumable=True)
    rows: int = setting(
        16, "windows scored together; while training, parallel streams that the split is cut into", at_least=1, resumable=True
    )


@dataclasses.dataclass(eq=False)
class Config(Section):
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    seed: int = setting(0, "seed of parameters, dropout and the order of windows", at_least=0, below=2**32)
    parallelism: str = setting(
        "pmap",
        "how work is spread over devices: a copy of the state on each, or the state split over a mesh of them",
        choices=("pmap", "sharded"),
        resumable=True,
    )
    mesh_shape: tuple[int, ...] | None = setting(
        None, "data × fsdp × tensor devices of a sharded run; None: all for fsdp", at_least=1, resumable=True
    )
    num_devices: int | None = setting(None, "devices to use; None: all that JAX sees", at_least=1, resumable=True)
    dropout_generator: str = setting(
        "threefry",
        "random bits of dropout: the same on any number of devices, or rbg's, which accelerators make faster and a CPU slower",
        choices=("threefry", "rbg"),
    )
    compute_dtype: str = setting(
        "float32", "precision of activations and matmuls; parameters and loss stay float32", choices=("float32", "bfloat16")
    )


# What an architecture, source or optimiser uses where its own fields are left open.
_RECURRENT_DEFAULTS = dict(
    num_layers=2,
    tie_embeddings=True,
    project_output=False,
    dropout_rate=0.0,
    word_dropout_rate=0.0,
    weight_drop_rate=0.0,
    state_dropout_rate=0.0,
    variational_dropout=False,
    kernel_init="xavier_uniform",
    recurrent_init="orthogonal",
    embedding_init="uniform",
    init_scale=0.1,
)
_MODEL_DEFAULTS = {
    "rnn": {**_RECURRENT_DEFAULTS, "activation": "tanh"},
    "gru": _RECURRENT_DEFAULTS,
    "lstm": {**_RECURRENT_DEFAULTS, "forget_bias": 1.0, "input_gate": "free"},
    "transformer": dict(
        num_layers=4,
        tie_embeddings=True,
        activation="gelu",
        num_heads=4,
        positions="rotary",
        norm="layer_norm",
        remat="none",
        dropout_rate=0.0,
        word_dropout_rate=0.0,
        kernel_init="xavier_uniform",
        embedding_init="normal",
        init_scale=0.02,
    ),
    "ngram": dict(ngram_order=5),
}
_DEFAULT_HIDDEN_DIM = 256
_MOST_MARKOV_ENTRIES = 1_000_000
# field of `data`: which sources or tokenizers it belongs to, and its value there when left open
_DATA_FIELDS = {
    "fractions": ("source", {"text": None}),
    "path": ("source", {"text": None, "tfds": None}),
    "dataset": ("source", {"tfds": None}),
    "text_feature": ("source", {"tfds": None}),
    "split_expressions": ("source", {"tfds": None}),
    "examples": ("source", {"tfds": "documents"}),
    "process": ("source", {"synthetic": "markov"}),
    "num_characters": ("source", {"synthetic": 1_000_000}),
    "synthetic_seed": ("source", {"synthetic": 0}),
    "alphabet_size": ("process", {"markov": 4, "hidden_markov": 4, "copy": 4}),
    "markov_order": ("process", {"markov": 2}),
    "num_states": ("process", {"hidden_markov": 4}),
    "copy_length": ("process", {"copy": 8}),
    "max_depth": ("process", {"dyck": 8}),
    "vocab_size": ("tokenizer", {"subword": 1000, "word": None}),
    "min_count": ("tokenizer", {"word": 1}),
}
_OPTIMIZER_FIELDS = {
    "final_fraction": ("schedule", {"cosine": 0.1}),
    "decay_factor": ("schedule", {"step": 0.5, "plateau": 0.25}),
    "decay_start_epoch": ("schedule", {"step": 4}),
    "plateau_patience": ("schedule", {"plateau": 0}),
    "momentum": ("name", {"momentum": 0.9, "rmsprop": 0.9, "muon": 0.95}),
    "b1": ("name", {"adam": 0.9, "adamw": 0.9, "lion": 0.9, "muon": 0.9}),
    "b2": ("name", {"adam": 0.999, "adamw": 0.999, "lion": 0.99, "muon": 0.95}),
    "adam_learning_rate": ("name", {"muon": None}),
}


def resolve(draft: Config) -> Config:
    """Checks every value of a draft and returns a frozen copy with what was left open filled in.

    Widths that follow from `model.num_params` are solved later (lm.models.build), once the vocabulary is known.

    Raises:
      UserError: the first wrong value, by name, with what would be right.
    """
    config = copy.deepcopy(draft)
    _check_values(config)
    _resolve_model(config.model)
    _resolve_dependent(config.data, _DATA_FIELDS)
    _resolve_dependent(config.optimizer, _OPTIMIZER_FIELDS)
    _resolve_data(config.data)
    _resolve_rest(config)
    return _frozen(config)


def replaced(config: Config, section: str, **values) -> Config:
    """A frozen copy of a resolved config with some values of one section exchanged (solved widths, a moved path)."""
    changed = copy.deepcopy(config)
    vars(getattr(changed, section)).update(values)
    return changed


def _sections(config):
    return [config, *(value for value in vars(config).values() if isinstance(value, Section))]


def _frozen(config):
    for section in _sections(config):
        object.__setattr__(section, "_frozen", True)
    return config


def _check_values(config):
    for section in _sections(config):
        for field in dataclasses.fields(section):
            if field.metadata:
                _check_value(section, field, config.model.architecture)


def _check_value(section, field, architecture):
    value, name, rule = getattr(section, field.name), f"config.{_dotted(section, field.name)}", field.metadata
    if value is None and type(None) in typing.get_args(field.type):
        return
    expected = _type_error(value, field.type)
    if expected:
        raise UserError(f"{name} is {value!r}, but must be {expected} ({rule['meaning']})")
    if rule["only"] and architecture not in rule["only"]:
        raise UserError(
            f"{name} is set, but a model with architecture {architecture!r} has no such field; "
            f"it belongs to {', '.join(rule['only'])}"
        )
    choices = rule["choices"]
    if isinstance(choices, dict):
        choices = choices[architecture]
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{name} is {value!r}, but must be one of {', '.join(choices)}{hint}")
    for number in value if isinstance(value, tuple) else (value,):
        for bound, holds, words in (
            ("at_least", lambda a, b: a >= b, "at least"),
            ("above", lambda a, b: a > b, "above"),
            ("at_most", lambda a, b: a <= b, "at most"),
            ("below", lambda a, b: a < b, "below"),
        ):
            if rule[bound] is not None and not holds(number, rule[bound]):
                raise UserError(f"{name} is {value!r}, but must be {words} {rule[bound]} ({rule['meaning']})")


def _type_error(value, annotation):
    """None if the value fits the annotation, else what would fit, in words."""
    options = [
        t
        for t in (typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,))
        if t is not type(None)
    ]
    (wanted,) = options
    if typing.get_origin(wanted) is tuple:
        item = typing.get_args(wanted)[0]
        fits = isinstance(value, tuple) and value and all(_type_error(part, item) is None for part in value)
        return None if fits else f"a tuple of {_KIND[item]}s"
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
        str: isinstance(value, str),
    }[wanted]
    return None if fits else f"a {_KIND[wanted]}"


_KIND = {bool: "truth value (True or False)", int: "whole number", float: "finite number", str: "string"}


def _resolve_model(model):
    for name, value in _MODEL_DEFAULTS[model.architecture].items():
        if getattr(model, name) is None and not (name == "num_layers" and model.layer_dims):
            setattr(model, name, value)
    if model.architecture == "ngram":
        return
    given = [name for name in ("num_params", "hidden_dim", "layer_dims") if getattr(model, name) is not None]
    if len(given) > 1:
        raise UserError(f"config.model.{given[0]} and config.model.{given[1]} both say how wide the model is; set one of them")
    if not given:
        model.hidden_dim = _DEFAULT_HIDDEN_DIM
    if model.layer_dims:
        if model.num_layers not in (None, len(model.layer_dims)):
            raise UserError(
                f"config.model.num_layers is {model.num_layers}, but config.model.layer_dims lists {len(model.layer_dims)} widths"
            )
        model.num_layers = len(model.layer_dims)
    for name in ("embedding_dropout_rate", "output_dropout_rate", "attention_dropout_rate"):
        applies = model.architecture in type(model).__dataclass_fields__[name].metadata["only"]
        if applies and getattr(model, name) is None:
            setattr(model, name, model.dropout_rate)
    last = model.layer_dims[-1] if model.layer_dims else model.hidden_dim
    if model.project_output and not (model.tie_embeddings and model.embed_dim):
        raise UserError(
            "config.model.project_output leads to a tied embedding of a width of its own; set config.model.tie_embeddings=True "
            "and config.model.embed_dim"
        )
    if model.tie_embeddings and not model.project_output:
        if None not in (model.embed_dim, last) and model.embed_dim != last:
            raise UserError(
                f"config.model.tie_embeddings needs an embedding as wide as the last layer, but config.model.embed_dim is "
                f"{model.embed_dim} and the last layer {last}; make them equal, or set config.model.project_output=True or "
                "config.model.tie_embeddings=False"
            )
        if model.embed_dim and model.num_params:
            raise UserError(
                "config.model.embed_dim cannot be set with tie_embeddings and num_params: the embedding is as wide as the "
                "layers, unless config.model.project_output=True"
            )
    if model.architecture == "transformer":
        _resolve_transformer(model)


def _resolve_transformer(model):
    if model.scan_layers is None:
        model.scan_layers = model.remat != "none"
    if model.hidden_dim and model.hidden_dim % model.num_heads:
        raise UserError(
            f"config.model.num_heads is {model.num_heads}, which does not divide config.model.hidden_dim {model.hidden_dim}; "
            f"hidden_dim {model.hidden_dim // model.num_heads * model.num_heads or model.num_heads} would work"
        )
    if model.positions == "rotary" and model.hidden_dim and model.hidden_dim // model.num_heads % 2:
        raise UserError(
            f"config.model.positions is 'rotary', which needs an even width per head, but hidden_dim / num_heads is "
            f"{model.hidden_dim // model.num_heads}"
        )
    if model.positions == "sinusoidal" and model.hidden_dim and model.hidden_dim % 2:
        raise UserError(f"config.model.positions is 'sinusoidal', which needs an even hidden_dim, but it is {model.hidden_dim}")
    if model.positions != "learned" and model.max_positions is not None:
        raise UserError("config.model.max_positions is set, but only positions='learned' has a table")
    if model.positions == "learned" and model.max_positions is None:
        model.max_positions = 1024
    if model.mlp_dim is not None and model.num_params is not None:
        raise UserError("config.model.num_params and config.model.mlp_dim are both set; mlp_dim is solved from the budget")
    if model.hidden_dim and model.mlp_dim is None:
        model.mlp_dim = default_mlp_dim(model)


def default_mlp_dim(model: ModelConfig) -> int:
    """Four times the width; two thirds of that for SwiGLU, which has three matrices (Shazeer 2020, arXiv:2002.05202)."""
    return model.hidden_dim * 4 if model.activation != "swiglu" else math.ceil(model.hidden_dim * 8 / 3)


def _resolve_dependent(section, table):
    for name, (other, values) in table.items():
        chosen = getattr(section, other)
        if chosen in values:
            if getattr(section, name) is None:
                setattr(section, name, values[chosen])
        elif getattr(section, name) is not None:
            prefix = type(section)._section
            raise UserError(
                f"config.{prefix}.{name} is set, but config.{prefix}.{other} is {chosen!r}; it belongs to {', '.join(values)}"
            )


def _resolve_data(data):
    if data.source == "text" and not data.path:
        raise UserError("config.data.source is 'text', but config.data.path is not set: give a folder or a file")
    if data.source == "tfds" and not (data.path or data.dataset):
        raise UserError("config.data.source is 'tfds', but neither config.data.dataset nor config.data.path says which dataset")
    if data.split_expressions is not None and len(data.split_expressions) != 3:
        raise UserError(
            f"config.data.split_expressions is {data.split_expressions}, but must be three: of train, valid and test, such as "
            "('train[:90%]', 'train[90%:95%]', 'train[95%:]')"
        )
    if data.source == "synthetic" and data.tokenizer not in ("char", "byte"):
        raise UserError(
            f"config.data.source is 'synthetic', whose entropy is known by character, but config.data.tokenizer is "
            f"{data.tokenizer!r}; set it to char or byte"
        )
    if data.process == "markov" and data.alphabet_size ** (data.markov_order + 1) > _MOST_MARKOV_ENTRIES:
        raise UserError(
            f"config.data.alphabet_size {data.alphabet_size} and config.data.markov_order {data.markov_order} make a table of "
            f"more than {_MOST_MARKOV_ENTRIES:,} probabilities; make one of them smaller"
        )
    if data.fractions is not None and (len(data.fractions) != 3 or abs(sum(data.fractions) - 1) > 1e-6 or data.fractions[0] <= 0):
        raise UserError(
            f"config.data.fractions is {data.fractions}, but must be three shares (train, valid, test) that add up to 1"
        )
    _resolve_mixture(data)
    if data.tokenizer == "word" and data.vocab_size is not None and data.vocab_size < 3:
        raise UserError(f"config.data.vocab_size is {data.vocab_size}, but word needs at least 3 (<eos>, <unk> and one word)")
    if data.tokenizer == "subword" and data.vocab_size < 258:
        raise UserError(
            f"config.data.vocab_size is {data.vocab_size}, but subword needs at least 258 (256 bytes, <eos> and one merge)"
        )


def _resolve_mixture(data):
    if (data.mixture is None) != (data.mixture_weights is None):
        raise UserError("config.data.mixture and config.data.mixture_weights belong together; set both, or none")
    if data.mixture is None:
        return
    if len(data.mixture_weights) != len(data.mixture) + 1 or abs(sum(data.mixture_weights) - 1) > 1e-6:
        raise UserError(
            f"config.data.mixture_weights is {data.mixture_weights}, but must be {len(data.mixture) + 1} shares that add up to "
            "1: of the config's own text, then of each of config.data.mixture"
        )


def _resolve_rest(config):
    optimizer, training, evaluation, model = config.optimizer, config.training, config.evaluation, config.model
    _resolve_devices(config)
    if config.data.mixture and model.architecture == "ngram":
        raise UserError("config.data.mixture is set, but an n-gram counts one text; set it to None")
    if optimizer.clip_norm is not None and optimizer.clip_value is not None:
        raise UserError("config.optimizer.clip_norm and config.optimizer.clip_value are both set; set the other to None")
    if optimizer.weight_decay is None:
        optimizer.weight_decay = 0.01 if optimizer.name == "adamw" else 0.0
    if optimizer.name == "muon" and optimizer.adam_learning_rate is None:
        optimizer.adam_learning_rate = optimizer.learning_rate
    if config.data.batch_size % training.num_micro_batches:
        raise UserError(
            f"config.training.num_micro_batches is {training.num_micro_batches}, which does not divide config.data.batch_size "
            f"{config.data.batch_size}"
        )
    carries = model.architecture != "transformer" or (model.attention_window is not None and model.positions != "learned")
    if not carries:
        if config.data.order == "stream":
            raise UserError(
                "config.data.order is 'stream', which carries state without end; a Transformer needs "
                "config.model.attention_window and positions other than 'learned' for that, or config.data.order='windows'"
            )
        if evaluation.context is None:
            evaluation.context = config.data.seq_len
    if model.positions == "learned":
        for name, length in (("data.seq_len", config.data.seq_len), ("evaluation.context", evaluation.context)):
            if length > model.max_positions:
                raise UserError(f"config.{name} is {length}, but the table of learned positions ends at {model.max_positions}")
    if evaluation.context is None and evaluation.stride is not None:
        raise UserError("config.evaluation.stride is set, but there are no windows: config.evaluation.context is None")
    if evaluation.context is not None:
        if evaluation.stride is None:
            evaluation.stride = max(1, evaluation.context // 4)
        if evaluation.stride > evaluation.context:
            raise UserError(
                f"config.evaluation.stride is {evaluation.stride}, longer than a window of {evaluation.context}: "
                "tokens would be left out"
            )


def _resolve_devices(config):
    shape = config.mesh_shape
    if shape is None:
        return
    if config.parallelism != "sharded":
        raise UserError(f"config.mesh_shape is set, but config.parallelism is {config.parallelism!r}; set it to sharded")
    if len(shape) != 3:
        raise UserError(f"config.mesh_shape is {shape}, but must be three numbers: data, fsdp and tensor, such as (2, 2, 2)")
    if config.num_devices not in (None, math.prod(shape)):
        raise UserError(
            f"config.num_devices is {config.num_devices}, but config.mesh_shape {shape} takes {math.prod(shape)}; leave it open"
        )


def to_json(config) -> dict:
    """Plain nested dict of a config or section, for config.json."""
    return {
        field.name: to_json(value) if isinstance(value, Section) else list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(config)
        for value in [vars(config)[field.name]]
    }


def from_json(values: dict, cls=Config):
    """The mutable config that `to_json` wrote.

    Raises:
      UserError: a field that does not exist.
    """
    config = cls()
    for name, value in values.items():
        if name not in cls.__dataclass_fields__:
            raise UserError(unknown_field(config, name))
        kind = cls.__dataclass_fields__[name].type
        if dataclasses.is_dataclass(kind):
            value = from_json(value, kind)
        setattr(config, name, tuple(value) if isinstance(value, list) else value)
    return config


def load_resolved(values: dict) -> Config:
    """The frozen config of a finished run, from its resolved form; widths it had solved stay as they are.

    Raises:
      UserError: a field that does not exist, or a value that it cannot have.
    """
    config = from_json(values)
    _check_values(config)
    return _frozen(config)


def given_fields(draft: Config) -> set[str]:
    """Names ("section.field") of the fields whose value differs from the default."""
    names = set()
    for section in _sections(draft):
        for field in dataclasses.fields(section):
            if field.metadata and vars(section)[field.name] != field.default:
                names.add(_dotted(section, field.name))
    return names


def differences(old: Config, new: Config) -> list[str]:
    """Sentences ("model.hidden_dim: 200 then, 300 now") for fixed fields that two resolved configs disagree on."""
    found = []
    for name, field, then, now in _pairs(old, new):
        fixed = not field.metadata["resumable"] or (
            name == "training.num_steps"
            and vars(old.optimizer)["schedule"] == "cosine"
            and vars(old.model)["architecture"] != "ngram"
        )
        if fixed and then != now:
            found.append(f"{name}: {then} then, {now} now")
    return found


def _pairs(old, new):
    for field in dataclasses.fields(old):
        then, now = vars(old)[field.name], vars(new)[field.name]
        if isinstance(then, Section):
            yield from _pairs(then, now)
        else:
            yield _dotted(old, field.name), field, then, now
