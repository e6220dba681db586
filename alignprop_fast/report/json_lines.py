"""A file of records, one per line, that stays readable if the process is killed."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop_fast.files import write_whole

if TYPE_CHECKING:
    pass


class JsonLines:
    """A file of JSON records, one per line, each with its "step".

    A process killed while writing leaves at most an incomplete last line, which reading skips; a full disk leaves none.
    Numbers that are not finite are written as null.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record. It is on the disk when this returns."""
        end = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(_finite(record)) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, end)
            raise

    def read(self) -> list[dict[str, Any]]:
        """All complete records."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                record = json.loads(line) if line.endswith("\n") else None
            except ValueError:
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
        return records

    def keep_until(self, step: int) -> None:
        """Drop incomplete records and those of later steps, which a resumed run writes again."""
        kept = [record for record in self.read() if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_whole(self.path, text.encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
