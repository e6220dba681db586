"""Cost tables that `plan` has estimated, kept for its next question. They are read without torch and the model.

The file name is a hash of everything that the tables depend on: the options that change them, the files that these
name, this package's code and the versions of the libraries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alignprop_fast.cli.plan_options import PlanOptions
from alignprop_fast.files import cache_folder
from alignprop_fast.planner import CostTable, load_table, save_table

# The options that say what is asked about a table. All others determine the table.
BESIDE_TABLE = {
    *("num_inference_steps", "truncation", "memory_budget", "host_memory"),
    *("table", "save_table", "json", "output_dir"),
}
_LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def batches(batch: int) -> tuple[int, int]:
    """The batch sizes of a question's tables. Two determine the costs at every other."""
    return batch, 2 if batch == 1 else 1


def read(options: PlanOptions) -> dict[int, CostTable] | None:
    """The kept tables by batch size; None if one is missing or damaged."""
    try:
        return {batch: load_table(_file(options, batch)) for batch in batches(options.batch_size)}
    except ValueError:
        return None


def keep(options: PlanOptions, tables: Mapping[int, CostTable]) -> None:
    """Keep the tables if the disk lets us."""
    for batch, table in tables.items():
        path = _file(options, batch)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_table(table, path)
        except OSError:
            return


def _file(options: PlanOptions, batch: int) -> Path:
    chosen = {name: value for name, value in asdict(options).items() if name not in BESIDE_TABLE}
    versions = [version(name) for name in _LIBRARIES]
    known = [chosen, [*_named(chosen)], versions, _code()]
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "plans" / f"{key}-{batch}.json"


def _named(chosen: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of the files that the options name, as PATH or NAME=PATH; of a folder those inside."""
    for value in chosen.values():
        for text in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(text, str):
                continue
            for path in (Path(text).expanduser(), Path(text.partition("=")[2]).expanduser()):
                if path.name and path.exists():
                    yield from map(_state, sorted(path.rglob("*")) if path.is_dir() else [path])


def _state(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns


def _code() -> str:
    """A hash of the package's code, which may change within a version."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
