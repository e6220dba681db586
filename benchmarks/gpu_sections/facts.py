"""Facts as JSON lines in one file. Each is on disk before the next step is tried. Standard library only."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Fact = dict[str, Any]


@dataclass
class Facts:
    """Adds facts to a file that several processes write. Each gets the fields of `common`: device, versions, commit."""

    file: Path
    common: Fact = field(default_factory=dict)
    after_next: Callable[[], None] | None = None  # called once, after the next fact: an injected fault

    def write(self, section: str, fact: str, **values: Any) -> None:
        """Write one line and flush it to the disk."""
        line = {"section": section, "fact": fact, **values, **self.common, "at": round(time.time(), 1)}
        data = (json.dumps(line, default=str) + "\n").encode()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, data)  # one call, so that lines of two processes do not mix
            os.fsync(handle)
        finally:
            os.close(handle)
        then, self.after_next = self.after_next, None
        if then is not None:
            then()


def read(file: Path) -> list[Fact]:
    """The facts of a file in order; empty without a file. Incomplete lines are skipped."""
    found: list[Fact] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
