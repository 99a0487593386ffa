"""Configs as plain values: to JSON and back, which fields were given, and what two configs disagree on."""

import dataclasses

from lm.config.fields import Config
from lm.config.section import Section, dotted, frozen, sections, unknown_field
from lm.config.values import check_values
from lm.errors import UserError

_OF_THE_HOST = {"data.path", "data.cache_dir", "data.prepared", "data.mixture", "data.prefetch"}  # where files stand there


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
    check_values(config)
    return frozen(config)


def given_fields(draft: Config) -> set[str]:
    """Names ("section.field") of the fields whose value differs from the default."""
    names = set()
    for section in sections(draft):
        for field in dataclasses.fields(section):
            if field.metadata and vars(section)[field.name] != field.default:
                names.add(dotted(section, field.name))
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
            why = " (a cosine ends with the last step)" if name == "training.num_steps" else ""
            found.append(f"{name}: {then} then, {now} now{why}")
    return found


def common_values(config: Config) -> dict[str, str]:
    """What all processes of a job must have the same: each field's name ("section.field") and its value, as text."""
    pairs = ((name, value) for name, _, value, _ in _pairs(config, config))
    return {name: repr(value) for name, value in pairs if name not in _OF_THE_HOST}


def _pairs(old, new):
    for field in dataclasses.fields(old):
        then, now = vars(old)[field.name], vars(new)[field.name]
        if isinstance(then, Section):
            yield from _pairs(then, now)
        else:
            yield dotted(old, field.name), field, then, now
