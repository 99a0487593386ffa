"""A whole experiment as typed dataclasses: the fields with their meanings, validation, and the way to and from JSON.

A config file returns a mutable `Config`; `resolve` checks every value, fills what an architecture leaves open and gives
a frozen copy, which is what everything else reads. Nothing here knows how any of it is carried out.
"""

from lm.config.fields import (
    ARCHITECTURES,
    INITIALIZERS,
    NEURAL,
    RECURRENT,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from lm.config.rules import check_clusters, default_mlp_dim, dropout_rates, is_open, layer_dims, left_open, replaced, resolve
from lm.config.section import Section, recording, unknown_field
from lm.config.stored import common_values, differences, from_json, given_fields, load_resolved, to_json, with_places

__all__ = [
    "ARCHITECTURES",
    "INITIALIZERS",
    "NEURAL",
    "RECURRENT",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Section",
    "TrainingConfig",
    "check_clusters",
    "common_values",
    "default_mlp_dim",
    "differences",
    "dropout_rates",
    "from_json",
    "given_fields",
    "is_open",
    "layer_dims",
    "left_open",
    "load_resolved",
    "recording",
    "replaced",
    "resolve",
    "to_json",
    "unknown_field",
    "with_places",
]
