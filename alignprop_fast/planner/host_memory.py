"""How much host memory offloading may lock: a part of the free memory, shared by the processes of this computer."""

import os
from collections.abc import Iterator
from pathlib import Path

# Locked memory cannot be swapped out, and other programs and the page cache need some too.
FRACTION = 0.5


def lockable_bytes(wanted_bytes: int | None = None, root: Path = Path("/")) -> int:
    """Bytes that this process may lock.

    wanted_bytes: what all processes of this computer may lock together; None: half of what is free.
    root: the folder that holds `proc` and `sys`.
    """
    allowed_bytes = int(FRACTION * available_bytes(root)) if wanted_bytes is None else wanted_bytes
    return allowed_bytes // int(os.environ.get("LOCAL_WORLD_SIZE") or "1")


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: what the computer has free or, if that is less, its control groups."""
    return max(0, min([_free_on_computer(root), *_free_in_groups(root)]))


def _free_on_computer(root: Path) -> int:
    """MemAvailable of Linux, or all memory if it is unknown."""
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_in_groups(root: Path) -> Iterator[int]:
    """Limit minus use of each control group (version 1 or 2) of this process, up to the root."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folder, limit, use, inactive = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            folder, limit, use = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            inactive = "total_inactive_file"
        else:
            continue
        group = Path(path.lstrip("/"))
        for place in (group, *group.parents):  # inside a container its own group may be mounted as the root
            files = root / folder / place
            most, used = _number(files / limit), _number(files / use)
            if most is not None and used is not None:
                yield most - used + _entry(files / "memory.stat", inactive)


def _entry(path: Path, name: str) -> int:
    """A number of memory.stat, such as the page cache within the used memory, which is freed on demand."""
    return next((int(line.split()[1]) for line in _lines(path) if line.startswith(name + " ")), 0)


def _number(path: Path) -> int | None:
    """The file's number; None if there is no file, or if it says "max" (no limit)."""
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
