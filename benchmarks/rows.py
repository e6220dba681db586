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
