"""Configs as plain values: to JSON and back, which fields were given, and what two configs disagree on."""

import dataclasses
import functools
from collections.abc import Iterator

from lm.config.fields import Config
from lm.config.rules import resolve
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


def load_resolved(resolved: dict, given: dict) -> Config:
    """The frozen config of a finished run, from its resolved form; widths it had solved stay as they are.

    A field that is younger than the run has the value that the config as given gets for it today.

    Raises:
      UserError: a field that does not exist, or a value that it cannot have.
    """
    config = from_json(resolved)
    check_values(config)
    younger = list(_absent(config, resolved))
    if younger:
        today = resolve(from_json(given))
        for *path, name in younger:
            setattr(functools.reduce(getattr, path, config), name, getattr(functools.reduce(getattr, path, today), name))
    return frozen(config)


def _absent(config, values) -> Iterator[tuple[str, ...]]:
    """Where the fields stand that plain values lack: names of sections, then of the field."""
    for field in dataclasses.fields(config):
        value = vars(config)[field.name]
        if field.name not in values:
            yield (field.name,)
        elif isinstance(value, Section):
            yield from ((field.name, *rest) for rest in _absent(value, values[field.name]))


def with_places(values: dict, config: Config) -> dict:
    """A config as plain values, with files standing where another config says."""
    places = {name.partition(".")[2] for name in _OF_THE_HOST}
    return {**values, "data": {**values["data"], **{name: to_json(config.data)[name] for name in places}}}


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
