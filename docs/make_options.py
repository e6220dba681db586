"""Writes docs/options.md from the declarations of the options.

python -P docs/make_options.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from math import isfinite
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from alignprop_fast.cli import app as cli
from alignprop_fast.training.config import AlignPropConfig, TrlFields, config_field
from alignprop_fast.training.declaration import Command, Declaration, Panel, declared, flag, taken
from alignprop_fast.training.options import TrainOptions

PAGE = Path(__file__).parent / "options.md"
HEAD = """# Options of the command line

Written by `python -P docs/make_options.py` from the options' declarations: change those, not this page.

In a YAML file for `train --config` an option has the same name with underscores and no dashes: `--batch-size 4` is
`batch_size: 4`. The command line beats the file; with `--resume` both beat the options that the run began with. In
Python the options of training are the fields of `AlignPropConfig`: see [below](#in-python).
"""
IN_PYTHON = """## In Python

[`AlignPropConfig`](api.md#training) has the 33 fields of trl 0.23.1, with trl's defaults. These stand for an option of
another name: {renamed}. Then come fields of our own:
"""


def page() -> str:
    """The page in Markdown: all of train, then of each command what train has not, or has otherwise; then Python."""
    commands: Mapping[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    train = _rows("train")
    parts = [HEAD, f"## train\n\n{_about(commands['train'])}", *_tables(train.values())]
    for name in (name for name in commands if name != "train"):
        rows = _rows(name)
        shared = [each for each in sorted(rows) if each in train and rows[each][1] == train[each][1]]
        parts.append(f"## {name}\n\n{_about(commands[name])}")
        if shared:
            parts.append(f"As in `train`: {', '.join(f'`{flag(each)}`' for each in shared)}.")
        parts += _tables(row for each, row in rows.items() if each not in shared)
    options = {each.name: option for each, option in declared(TrainOptions)}
    trl = {field.name for field in fields(TrlFields)}
    renamed = {config_field(name, option): name for name, option in options.items() if option.field in trl}
    parts.append(IN_PYTHON.format(renamed=", ".join(f"`{field}` (`{flag(name)}`)" for field, name in renamed.items())))
    own = [pair for pair in declared(AlignPropConfig) if pair[0].name not in trl]
    parts.append(_table("field", (_row(f"`{each.name}`", AlignPropConfig, each, option) for each, option in own)))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _about(command: Any) -> str:
    """The first paragraph of the command's help."""
    return " ".join(command.help.split("\n\n")[0].split())


def _rows(command: str) -> dict[str, tuple[Panel | None, str]]:
    """Panel and row of each option of a command, by name."""
    defaults, rows = getattr(cli, command).defaults, {}
    for each, option in taken(defaults, Command[command.upper()]):
        name = f"`{option.argument or flag(each.name)}`"
        if each.default is True:
            name += f" / `{flag('no_' + each.name)}`"
        rows[each.name] = (option.panel, _row(name, defaults, each, option))
    return rows


def _tables(rows: Iterable[tuple[Panel | None, str]]) -> list[str]:
    by_panel: dict[Panel | None, list[str]] = {}
    for panel, row in rows:
        by_panel.setdefault(panel, []).append(row)
    return [f"**{panel or 'Arguments and options'}**\n\n{_table('option', rows)}" for panel, rows in by_panel.items()]


def _table(what: str, rows: Iterable[str]) -> str:
    return "\n".join([f"| {what} | values | default | meaning |", "|---|---|---|---|", *rows])


def _row(name: str, owner: Any, field: Field[Any], option: Declaration) -> str:
    hints = get_type_hints(owner if isinstance(owner, type) else type(owner))
    default = field.default if isinstance(owner, type) else getattr(owner, field.name)
    cells = (name, _values(option, hints[field.name]), _default(option, default), " ".join(option.help.split()))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _values(option: Declaration, hint: Any) -> str:
    """What an option takes, in words."""
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    if kinds == [bool]:
        return ""
    words = {(int,): "whole number", (float,): "number", (int, str): "size"}
    repeated = ", repeatable" if ... in kinds else ""
    kind = words.get(tuple(each for each in kinds if each is not ...), "text")
    return kind + _bounds(option) + repeated


def _bounds(option: Declaration) -> str:
    if isfinite(option.at_least) and isfinite(option.at_most):
        return f", {option.at_least} to {option.at_most}"
    bounds = {"{} or more": option.at_least, "above {}": option.above, "{} or less": option.at_most}
    bounds["below {}"] = option.below
    return "".join(f", {words.format(bound)}" for words, bound in bounds.items() if isfinite(bound))


def _default(option: Declaration, default: Any) -> str:
    if option.argument:
        return "must be given"
    if isinstance(default, bool):
        return "on" if default else "off"
    return option.shown if default in (None, (), "") else f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
