"""The CSV files of benchmarks."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignprop_fast.files import write_whole


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Iterable[str] | None = None) -> None:
    """Write a CSV file whole, and its folder if it is missing.

    columns: the keys to write, in order. None: those of the first row. A row without a key has an empty cell.

    Raises:
        ValueError: a row has a key that no column is for.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0] if columns is None else columns))
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue().encode())


class KeptRows:
    """A CSV file that grows run by run, so that an interrupted benchmark goes on where it stopped.

    Args:
        path: of the file, read at each use: other processes may add rows between two uses.
        keys: the columns that name a run.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path, self.keys = path, keys

    def read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def has(self, *run: Any) -> bool:
        """Whether there are rows with these values of the keys."""
        wanted = [str(value) for value in run]
        return any([row[key] for key in self.keys] == wanted for row in self.read())

    def check(self, **same: str) -> None:
        """Raises SystemExit if rows have another value in one of these columns: tables and plots would mix them."""
        for column, value in same.items():
            if others := {row[column] for row in self.read()} - {value}:
                raise SystemExit(f"{self.path} has runs with the {column} {min(others)}: give another --csv")

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the rows of one run."""
        write_rows(self.path, [*self.read(), *rows])
