"""Writes docs/options.md from the command line itself.

python -P docs/make_options.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import typer

from alignprop_fast.cli.app import app

PAGE = Path(__file__).parent / "options.md"
HEAD = """# Options of the command line

Written by `python -P docs/make_options.py` from the commands themselves: change those, not this page.

In a YAML file for `train --config` an option has the same name with underscores and no dashes: `--batch-size 4` is
`batch_size: 4`. The command line beats the file; with `--resume` both beat the options that the run began with. In
Python the options of training are the fields of [`AlignPropConfig`](api.md#training).
"""


def page() -> str:
    """The page in Markdown: all of train, then of each command what train has not, or has otherwise."""
    commands: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    train = {option.name: option for option in _options(commands["train"])}
    parts = [HEAD, f"## train\n\n{_about(commands['train'])}\n\n{_tables(train.values())}"]
    for name, command in commands.items():
        if name == "train":
            continue
        options = list(_options(command))
        shared = [o for o in options if o.name in train and _row(o) == _row(train[o.name])]
        parts.append(f"## {name}\n\n{_about(command)}")
        if shared:
            names = ", ".join(f"`{option.opts[0]}`" for option in sorted(shared, key=lambda o: o.opts[0]))
            parts.append(f"As in `train`: {names}.")
        own = [option for option in options if option not in shared]
        if own:
            parts.append(_tables(own))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _options(command: Any) -> Iterator[Any]:
    """Options and arguments of a command, without --help."""
    return (parameter for parameter in command.params if parameter.name != "help")


def _about(command: Any) -> str:
    """The first paragraph of the command's help."""
    return " ".join(command.help.split("\n\n")[0].split())


def _tables(options: Any) -> str:
    by_panel: dict[str, list[str]] = {}
    for option in options:
        by_panel.setdefault(option.rich_help_panel or "Arguments and options", []).append(_row(option))
    return "\n\n".join(
        "\n".join([f"**{panel}**", "", "| option | values | default | meaning |", "|---|---|---|---|", *rows])
        for panel, rows in by_panel.items()
    )


def _row(option: Any) -> str:
    names = (*option.opts, *option.secondary_opts) if option.opts[0].startswith("-") else (option.metavar,)
    cells = (
        " / ".join(f"`{name}`" for name in names),
        _values(option),
        _default(option),
        " ".join(option.help.split()),
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _values(option: Any) -> str:
    """What an option takes, in words. Reads the annotation as the pinned typer holds it."""
    annotation = option.type_descriptor.annotation
    (kind, *_) = [part for part in (get_args(annotation) or [annotation]) if part is not type(None)]
    if kind is bool:
        return ""
    repeated = ", repeatable" if option.multiple or option.nargs == -1 else ""
    if issubclass(kind, Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind) + repeated
    low, high = option.min, option.max
    limits = "" if low is None else f", {low} or more" if high is None else f", {low} to {high}"
    return {int: "whole number", float: "number"}.get(kind, "text") + limits + repeated


def _default(option: Any) -> str:
    shown, default = option.show_default, option.default
    if option.required:
        return "must be given"
    if isinstance(shown, str):
        return shown
    if isinstance(default, bool):
        return "on" if default else "off"
    default = getattr(default, "value", default)
    return "" if default is None or default in ((), []) else f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
