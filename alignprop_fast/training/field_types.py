"""Values of a dataclass's fields against its annotations: a YAML file gives other types than were meant."""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

_WORDS = {
    str: "a text",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    dict: "a dictionary",
    tuple[int, int]: "two whole numbers",
    NoneType: "None",
}


def as_plain_types(instance: Any, paths: tuple[str, ...] = ()) -> None:
    """Replace NumPy's numbers by Python's, and `Path`s in the fields `paths` by texts, as JSON and YAML take them."""
    for name in (field.name for field in fields(instance)):
        value = getattr(instance, name)
        if isinstance(value, tuple):
            value = tuple(map(_plain_number, value))
        elif name in paths and isinstance(value, os.PathLike):
            value = os.fspath(value)
        setattr(instance, name, _plain_number(value))


def _plain_number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def check_types(instance: Any, sizes: tuple[str, ...] = ()) -> None:
    """sizes: fields that `parse_bytes` looks at.

    Raises:
        ValueError: a field's value is of another type; one line with the remedy. A whole number is a number, too; True
            and False are none.
    """
    hints = get_type_hints(type(instance))
    for name in (field.name for field in fields(instance) if field.name not in sizes):
        value, kinds = getattr(instance, name), _kinds(hints[name])
        if _fits(value, kinds):
            continue
        remedy = " or ".join(_WORDS[kind] for kind in kinds)
        if str in kinds and not isinstance(value, str):
            remedy += " (in YAML, texts such as no, on and 12 stand in quotes)"
        elif float in kinds and isinstance(value, str):
            remedy += " (in YAML, 1e-4 is a text and 1.0e-4 a number)"
        raise ValueError(f"{name} is {value!r}: use {remedy}")


def _kinds(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is UnionType:
        return get_args(hint)
    return (get_origin(hint) if get_origin(hint) is dict else hint,)


def _fits(value: Any, kinds: tuple[Any, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return any(_is(value, kind) for kind in kinds)


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, ((p,) for p in parts)))
    return isinstance(value, {int: numbers.Integral, float: numbers.Real, dict: Mapping}.get(kind, kind))
