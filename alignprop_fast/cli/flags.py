"""Options in messages: the library names its own arguments and fields, and users typed flags."""

from __future__ import annotations

import re
from functools import cache

from alignprop_fast.training.declaration import Command, declared, flag
from alignprop_fast.training.options import TrainOptions

# A name outside paths and quotes; with = or a quoted value behind it, if it has one.
_NAMED = re.compile(r"""(?<![\w./'"-])(?P<name>\w+)(?![\w/(]|\.\w)(?P<sets>=?)(?:(?<==)(['"])(?P<value>\S+?)\3)?""")


def in_flags(message: str) -> str:
    """The message with arguments and config fields named as on the command line: `base_dtype="nf4"` becomes
    `--base-dtype=nf4`.

    A word without underscore and value may be plain English (seed, steps) and stays.
    """
    return _NAMED.sub(_in_flags, message)


def _in_flags(found: re.Match[str]) -> str:
    name, sets, value = found["name"], found["sets"], found["value"] or ""
    known = _flags().get(name) if sets or "_" in name else None
    return found[0] if known is None else f"{known}{sets}{value}"


@cache
def _flags() -> dict[str, str]:
    """The flags by the names of options, and by those of the config's fields where trl has other ones."""
    options = [(each.name, option) for each, option in declared(TrainOptions) if option.commands != Command.NONE]
    return {known: flag(name) for name, option in options for known in (name, option.field)}
