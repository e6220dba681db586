"""Files that are there whole or not at all: written under a temporary name beside their own, then renamed."""

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
    """A name to write a file under, which becomes `path` where the block ends well; else nothing of it is left."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
