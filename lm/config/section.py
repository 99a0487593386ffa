"""What every section of a config is made of: fields that say what they mean, and a class that guards them."""

import contextlib
import dataclasses
import difflib

from lm.errors import UserError

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
            raise UserError(f"config.{dotted(self, name)} cannot be changed: this config is already resolved")
        if name not in self.__dataclass_fields__:
            raise UserError(unknown_field(self, name))
        object.__setattr__(self, name, value)

    def __getattribute__(self, name):
        if (
            _reads is not None
            and name in type(self).__dataclass_fields__
            and object.__getattribute__(self, "__dict__").get("_frozen")
        ):
            _reads.add(dotted(self, name))
        return object.__getattribute__(self, name)

    def _values(self):
        return tuple(vars(self)[field.name] for field in dataclasses.fields(self))

    def __eq__(self, other):
        return type(self) is type(other) and self._values() == other._values()

    def __hash__(self):
        return hash((type(self), self._values()))


def dotted(section, name) -> str:
    """The name of a field as a person gives it: "section.field"."""
    prefix = type(section)._section
    return f"{prefix}.{name}" if prefix else name


def unknown_field(section, name) -> str:
    """The sentence for a field that does not exist, with the nearest one that does."""
    names = [field.name for field in dataclasses.fields(section)]
    near = difflib.get_close_matches(name, names, 1)
    return f"config.{dotted(section, name)} does not exist; " + (
        f"did you mean {dotted(section, near[0])}?" if near else f"there are: {', '.join(names)}"
    )


def sections(config):
    """The config itself, then each of its sections."""
    return [config, *(value for value in vars(config).values() if isinstance(value, Section))]


def frozen(config):
    """The same config, from now on unchangeable."""
    for section in sections(config):
        object.__setattr__(section, "_frozen", True)
    return config
