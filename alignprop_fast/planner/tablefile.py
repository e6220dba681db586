"""Cost tables as JSON files; counted ones are compressed."""

import gzip
import json
import os
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignprop_fast.planner.block_option import BlockOption
from alignprop_fast.planner.counted import CountedGraphs, CountedReward, CountedTable
from alignprop_fast.planner.cuda_graphs import GraphCosts
from alignprop_fast.planner.operators import Operator, Operators
from alignprop_fast.planner.table import CostTable, Option, Segment, Stage

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # version 1 calls transient_bytes spike_bytes
_REMEDY = "measure or estimate the table again"


def save_table(table: CostTable, path: str | os.PathLike) -> None:
    """Write a cost table as JSON, replacing an older file. A crash never leaves a partial file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = json.dumps({"format_version": FORMAT_VERSION, "table": asdict(table)}, indent=1, allow_nan=False)
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_table(path: str | os.PathLike) -> CostTable:
    """Read a cost table that `save_table` wrote.

    Raises:
        ValueError: the file is missing, damaged, of another format version, or not a cost table.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the cost table {path} ({error.strerror}): {_REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"the cost table {path} is damaged: {_REMEDY}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in READABLE_VERSIONS:
        found = "no format version" if version is None else f"format version {version}"
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise ValueError(f"the cost table {path} has {found}, but this program reads {readable}: {_REMEDY}")
    try:
        return _table(content["table"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the cost table {path} has missing or unknown entries: {_REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"the cost table {path} is wrong: {error}") from error


def _option(entry: dict[str, Any]) -> Option:
    known = {"transient_bytes" if name == "spike_bytes" else name: value for name, value in entry.items()}
    return Option(**{**known, "name": BlockOption(known["name"])})


def _segments(entries: list[dict[str, Any]]) -> tuple[Segment, ...]:
    return tuple(Segment(**{**entry, "options": tuple(map(_option, entry["options"]))}) for entry in entries)


def _stages(entries: list[dict[str, Any]]) -> tuple[Stage, ...]:
    return tuple(Stage(**{**entry, "segments": _segments(entry["segments"])}) for entry in entries)


def _table(entries: dict[str, Any]) -> CostTable:
    graphs = entries.get("graphs")
    parts: dict[str, Any] = {"step": _segments(entries["step"]), "graphs": graphs and GraphCosts(**graphs)}
    return CostTable(
        **{**entries, **parts, "decoders": _stages(entries["decoders"]), "rewards": _stages(entries["rewards"])}
    )


def packed(counted: CountedTable | CountedReward) -> bytes:
    """The counts as compressed text. Equal counts give equal bytes."""
    return gzip.compress(as_text(counted).encode(), mtime=0)


def unpacked(data: bytes) -> CountedTable | CountedReward:
    """The counts that `packed` wrote.

    Raises:
        ValueError: they are damaged.
    """
    try:
        return from_text(gzip.decompress(data).decode())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"damaged counts: {error}") from error


def as_text(counted: CountedTable | CountedReward) -> str:
    """The counts as JSON in one line: all operators once, then all collections of them once, then the rest."""
    places: dict[Operator, int] = {}
    collections: dict[tuple[int, ...], int] = {}

    def plain(value: Any) -> Any:
        """A dataclass as its fields (`asdict` would copy all operators); operators as the place of their collection,
        which has the place of an operator and its times, and so on."""
        if not isinstance(value, Operators):
            return vars(value)
        numbers = tuple(n for one, times in value.times.items() for n in (places.setdefault(one, len(places)), times))
        return [collections.setdefault(numbers, len(collections))]

    text = json.dumps(counted, default=plain, separators=(",", ":"))
    known, sums = (json.dumps([*items], separators=(",", ":")) for items in (places, collections))
    return f'{{"operators":{known},"collections":{sums},"counted":{text}}}'


def from_text(text: str) -> CountedTable | CountedReward:
    """The counts of `as_text`.

    Raises:
        ValueError: they are damaged.
    """
    try:
        content = json.loads(text)
        known = [Operator(*entry) for entry in content["operators"]]
        collections = [
            Operators(dict(zip(map(known.__getitem__, numbers[::2]), numbers[1::2], strict=True)))
            for numbers in content["collections"]
        ]
        counted = _with_operators(content["counted"], collections)
        if "stages" in counted:
            return CountedReward(_stages(counted["stages"]), counted["weight_bytes"])
        graphs = counted["graphs"]
        return CountedTable(_table(counted["costs"]), graphs and CountedGraphs(**graphs))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged counts: {error}") from error


def _with_operators(tree: Any, collections: list[Operators]) -> Any:
    """The tree with `Operators` where seconds are the place of a collection, in a list."""
    if isinstance(tree, list):
        return [_with_operators(item, collections) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        name: collections[value[0]]
        if name.endswith("seconds") and isinstance(value, list)
        else _with_operators(value, collections)
        for name, value in tree.items()
    }
