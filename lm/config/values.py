"""Whether a value is of the type, within the bounds and among the choices that its field declares."""

import dataclasses
import difflib
import sys
import types
import typing

from lm.config.section import dotted, sections
from lm.errors import UserError


def check_values(config):
    """Refuses, by name, the first value of the wrong type, out of bounds, or of a field that another architecture has."""
    for section in sections(config):
        for field in dataclasses.fields(section):
            if field.metadata:
                _check_value(section, field, config.model.architecture)


def _check_value(section, field, architecture):
    value, name, rule = getattr(section, field.name), f"config.{dotted(section, field.name)}", field.metadata
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
        float: isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max,
        str: isinstance(value, str),
    }[wanted]
    return None if fits else f"a {_KIND[wanted]}"


_KIND = {bool: "truth value (True or False)", int: "whole number", float: "finite number", str: "string"}
