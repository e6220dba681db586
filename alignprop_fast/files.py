"""Writes files so that a crash leaves no partial file: under a temporary name in the same folder, then renamed.

And the folder of what this package keeps between its runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole."""
    with whole(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary name for a file. It becomes `path` when the block ends; after an exception the file is removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """The user's folder for measurements on this machine."""
    return Path.home() / ".cache" / "alignprop_fast"
