"""Reads a YAML file of options as texts: `no` is the text "no" and `010` the text "010", as on the command line.

YAML's own rules would turn texts into False, 8, dates or numbers. The type of each option decides instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer
import yaml

_TAG = "tag:yaml.org,2002:"
_PLAIN = tuple(_TAG + kind for kind in ("str", "null", "bool", "int", "float", "timestamp", "merge", "value"))


def read_yaml(path: Path) -> Mapping[str, str | list[str] | None]:
    """Options by name: texts, lists of texts, or None for an empty value, null or ~.

    Raises:
        typer.BadParameter: the file cannot be read, is not YAML or not a mapping, or has a name twice; or a value is of
            another kind. The message is one line.
    """
    form = "write lines such as 'batch_size: 4'"
    try:
        root = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise typer.BadParameter(f"cannot read the config file {path}: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise typer.BadParameter(f"{path} is not valid YAML{where}: {form}") from error
    if not isinstance(root, yaml.MappingNode):
        raise typer.BadParameter(f"{path} contains no options: {form}")
    options: dict[str, str | list[str] | None] = {}
    for key, value in root.value:
        name, where = _text(key), f"line {key.start_mark.line + 1} of {path}"
        if name is None:
            raise typer.BadParameter(f"{where} has no name before the colon: {form}")
        if name in options:
            raise typer.BadParameter(f"{where} gives {name} a second time: give it once")
        if isinstance(value, yaml.SequenceNode):
            texts = [_text(item) for item in value.value]
            listed = [text for text in texts if text is not None]
            if len(listed) < len(texts):
                raise typer.BadParameter(f'{where}: {name} must be a list of texts, such as \'{name}: ["a", "b"]\'')
            options[name] = listed
        elif value.tag == _TAG + "null":
            options[name] = None
        elif (text := _text(value)) is None:
            raise typer.BadParameter(f"{where}: {name} must be a single value; put a text in quotes")
        else:
            options[name] = text
    return options


def _text(node: yaml.Node) -> str | None:
    """A scalar as written, without its quotes; None for null, for other nodes, and for scalars with an explicit tag."""
    plain = isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN and node.tag != _TAG + "null"
    return node.value if plain else None
