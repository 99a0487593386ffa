"""From a draft to a config that can be trusted: every value checked, what an architecture leaves open filled in."""

import copy
import math
import os
from typing import Any

from lm.config.fields import Config, ModelConfig
from lm.config.section import frozen
from lm.config.values import check_values
from lm.errors import UserError

# What an architecture, source or optimiser uses where its own fields are left open.
_RECURRENT_DEFAULTS = dict(
    num_layers=2,
    skip_connections=False,
    tie_embeddings=True,
    project_output=False,
    num_softmaxes=1,
    dropout_rate=0.0,
    word_dropout_rate=0.0,
    variational_dropout=False,
    kernel_init="xavier_uniform",
    embedding_init="uniform",
    init_scale=0.1,
)
_STATEFUL_DEFAULTS = {**_RECURRENT_DEFAULTS, "weight_drop_rate": 0.0, "state_dropout_rate": 0.0, "recurrent_init": "orthogonal"}
_MODEL_DEFAULTS = {
    "rnn": {**_STATEFUL_DEFAULTS, "activation": "tanh"},
    "gru": _STATEFUL_DEFAULTS,
    "slstm": {**_STATEFUL_DEFAULTS, "forget_bias": 3.0},
    "mingru": _RECURRENT_DEFAULTS,
    "minlstm": {**_RECURRENT_DEFAULTS, "forget_bias": 1.0},
    "mlstm": {**_RECURRENT_DEFAULTS, "forget_bias": 3.0, "num_heads": 4},
    "lstm": {**_STATEFUL_DEFAULTS, "forget_bias": 1.0, "input_gate": "free", "mogrifier_rounds": 0},
    "transformer": dict(
        num_layers=4,
        tie_embeddings=True,
        num_softmaxes=1,
        activation="gelu",
        num_heads=4,
        positions="rotary",
        norm="layer_norm",
        qk_norm=False,
        remat="none",
        dropout_rate=0.0,
        word_dropout_rate=0.0,
        variational_dropout=False,
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
_TRAINING_FIELDS = {
    "averaging_patience": ("averaging", {"stall": 5}),
    "averaging_decay": ("averaging", {"start": None, "stall": None}),
}


def left_open(section: str, field: str) -> dict[str, Any]:
    """What a field becomes that is left open, by architecture, source, tokenizer or what else it depends on; empty where no
    table says so."""
    if section == "model":
        return {name: defaults[field] for name, defaults in _MODEL_DEFAULTS.items() if field in defaults}
    tables = {"data": _DATA_FIELDS, "optimizer": _OPTIMIZER_FIELDS, "training": _TRAINING_FIELDS}
    _, values = tables.get(section, {}).get(field, ("", {}))
    return values


def resolve(draft: Config) -> Config:
    """Checks every value of a draft and returns a frozen copy with what was left open filled in.

    Widths that follow from `model.num_params` are solved later (lm.models.build), once the vocabulary is known.

    Raises:
      UserError: the first wrong value, by name, with what would be right.
    """
    config = copy.deepcopy(draft)
    check_values(config)
    _resolve_model(config.model)
    _resolve_dependent(config.data, _DATA_FIELDS)
    _resolve_dependent(config.optimizer, _OPTIMIZER_FIELDS)
    _resolve_dependent(config.training, _TRAINING_FIELDS)
    _resolve_data(config.data)
    _resolve_rest(config)
    return frozen(config)


def replaced(config: Config, section: str, **values) -> Config:
    """A frozen copy of a resolved config with some values of one section exchanged (solved widths, a moved path)."""
    changed = copy.deepcopy(config)
    vars(getattr(changed, section)).update(values)
    return changed


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
        if model.skip_connections and len(set(model.layer_dims)) > 1:
            raise UserError(
                f"config.model.skip_connections adds up what all layers put out, but config.model.layer_dims is "
                f"{model.layer_dims}; give them one width"
            )
    for name in ("embedding_dropout_rate", "output_dropout_rate", "attention_dropout_rate"):
        applies = model.architecture in type(model).__dataclass_fields__[name].metadata["only"]
        if applies and getattr(model, name) is None:
            setattr(model, name, model.dropout_rate)
    if model.narrowing is not None and not model.cutoffs:
        raise UserError("config.model.narrowing is set, but there are no clusters: set config.model.cutoffs too, or neither")
    if model.cutoffs:
        _resolve_clusters(model)
    if model.mogrifier_rank is not None and not model.mogrifier_rounds:
        raise UserError("config.model.mogrifier_rank is set, but config.model.mogrifier_rounds is 0; set that too, or neither")
    for width in (model.layer_dims or (model.hidden_dim,)) if model.architecture == "mlstm" else ():
        if width and width % model.num_heads:
            raise UserError(f"config.model.num_heads is {model.num_heads}, which does not divide a layer's width of {width}")
    last = model.layer_dims[-1] if model.layer_dims else model.hidden_dim
    if model.project_output and not (model.tie_embeddings and model.embed_dim):
        raise UserError(
            "config.model.project_output leads to a tied embedding of a width of its own; set config.model.tie_embeddings=True "
            "and config.model.embed_dim"
        )
    if model.softmax_dropout_rate is not None and model.num_softmaxes == 1:
        raise UserError("config.model.softmax_dropout_rate is set, but config.model.num_softmaxes is 1; set that too, or neither")
    if model.project_output and model.num_softmaxes > 1:
        raise UserError(
            "config.model.project_output is set, but a mixture of softmaxes projects to its width anyway; leave it open"
        )
    if model.tie_embeddings and not model.project_output and model.num_softmaxes == 1:
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


def _resolve_clusters(model):
    model.narrowing = model.narrowing or 4
    if list(model.cutoffs) != sorted(set(model.cutoffs)):
        raise UserError(f"config.model.cutoffs is {model.cutoffs}, but must rise from one to the next")
    if model.num_softmaxes > 1 or model.project_output:
        raise UserError("config.model.cutoffs is an output of its own: leave num_softmaxes and project_output open")
    check_clusters(model)
    if model.embed_dim is not None and not model.tie_embeddings:
        raise UserError(
            "config.model.cutoffs with untied embeddings has an output as wide as its embedding; leave embed_dim open"
        )


def check_clusters(model: ModelConfig) -> None:
    """Raises a UserError where the narrowest cluster would have no width; says nothing of a width that is yet to be solved."""
    width = model.embed_dim or (model.layer_dims[-1] if model.layer_dims else model.hidden_dim)
    if model.cutoffs and width is not None and width < model.narrowing ** len(model.cutoffs):
        raise UserError(
            f"config.model.cutoffs makes {len(model.cutoffs)} further clusters, each {model.narrowing} times narrower than the "
            f"last, which leaves nothing of a width of {width}; give fewer cutoffs or a smaller config.model.narrowing"
        )


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
    if model.positions in ("sinusoidal", "relative") and model.hidden_dim and model.hidden_dim % 2:
        raise UserError(
            f"config.model.positions is {model.positions!r}, which needs an even hidden_dim, but it is {model.hidden_dim}"
        )
    if model.positions != "learned" and model.max_positions is not None:
        raise UserError("config.model.max_positions is set, but only positions='learned' has a table")
    if model.positions == "learned" and model.max_positions is None:
        model.max_positions = 1024
    if model.mlp_dim is not None and model.num_params is not None:
        raise UserError("config.model.num_params and config.model.mlp_dim are both set; mlp_dim is solved from the budget")
    if model.hidden_dim and model.mlp_dim is None:
        model.mlp_dim = default_mlp_dim(model)


def dropout_rates(model: ModelConfig) -> list[str]:
    """Names of the fields by which the model drops something in training."""
    return [name for name, value in vars(model).items() if name.endswith("_rate") and value]


def layer_dims(model: ModelConfig) -> tuple[int, ...]:
    """The width of each layer, of a config whose widths are solved."""
    return model.layer_dims or (model.hidden_dim,) * model.num_layers


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
    if data.source == "text" and not data.path and not data.prepared:
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
    if data.seq_len_std is not None and (data.order != "stream" or data.mixture is not None):
        raise UserError(
            "config.data.seq_len_std is set, but only steps of one stream can differ in length; set config.data.order='stream' "
            "and no config.data.mixture, or leave it open"
        )
    if data.seq_len_std is not None and data.seq_len_std > data.seq_len / 2:
        raise UserError(
            f"config.data.seq_len_std is {data.seq_len_std}, but must be at most half of config.data.seq_len, {data.seq_len}, or "
            "steps of that length on average cannot be drawn"
        )
    if data.order in ("packed", "padded") and is_open(data.tokenizer, data.source, data.examples):
        raise UserError(
            f"config.data.order is {data.order!r}, but no document ends in this text; set config.data.order='windows', or "
            "config.data.tokenizer='word', whose documents are lines, or take a config.data.source of documents"
        )
    if data.tokenizer == "word" and data.vocab_size is not None and data.vocab_size < 3:
        raise UserError(f"config.data.vocab_size is {data.vocab_size}, but word needs at least 3 (<eos>, <unk> and one word)")
    if data.tokenizer == "subword" and data.vocab_size < 258:
        raise UserError(
            f"config.data.vocab_size is {data.vocab_size}, but subword needs at least 258 (256 bytes, <eos> and one merge)"
        )


def is_open(tokenizer: str, source: str, examples: str | None) -> bool:
    """Whether the tokens of such a text are one long row in which no document ends."""
    return tokenizer != "word" and (source in ("text", "synthetic") or examples == "pieces")


def _resolve_mixture(data):
    if (data.mixture is None) != (data.mixture_weights is None):
        raise UserError("config.data.mixture and config.data.mixture_weights belong together; set both, or none")
    if data.mixture is None:
        return
    if len({os.path.abspath(folder) for folder in data.mixture}) < len(data.mixture):
        raise UserError(
            f"config.data.mixture is {data.mixture}, which names a folder twice; name it once, with the sum of its weights"
        )
    if len(data.mixture_weights) != len(data.mixture) + 1 or abs(sum(data.mixture_weights) - 1) > 1e-6:
        raise UserError(
            f"config.data.mixture_weights is {data.mixture_weights}, but must be {len(data.mixture) + 1} shares that add up to "
            "1: of the config's own text, then of each of config.data.mixture"
        )


def _resolve_rest(config):
    optimizer, training, evaluation, model = config.optimizer, config.training, config.evaluation, config.model
    if training.label_smoothing and ((model.num_softmaxes or 1) > 1 or model.cutoffs):
        raise UserError(
            f"config.training.label_smoothing is {training.label_smoothing}, which neither a mixture of softmaxes nor an "
            "adaptive softmax takes; set it to 0"
        )
    if model.cutoffs and config.data.tokenizer != "word":
        raise UserError(
            f"config.model.cutoffs is set, but the tokens of {config.data.tokenizer!r} are not numbered by frequency; it needs "
            "config.data.tokenizer='word'"
        )
    _resolve_devices(config)
    if config.data.mixture and model.architecture == "ngram":
        raise UserError("config.data.mixture is set, but an n-gram counts one text; set it to None")
    if training.init_from and model.architecture == "ngram":
        raise UserError("config.training.init_from is set, but an n-gram has no parameters to start from; set it to None")
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
