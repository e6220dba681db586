"""Checkpoints: folders that are there whole or not at all, and the random-number states that go into them.

    <root>/checkpoint_<n>/      n = optimizer steps done
        pytorch_lora_weights.safetensors (or unet/), optimizer.pt, rng.pt, config.json
        checkpoint.json         counters, versions, and size and SHA-256 of every other file

A checkpoint is filled under a temporary name, flushed to the disk and renamed, so a process that is killed at any
moment leaves complete checkpoints and at most a temporary folder, which the next one clears away.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

MANIFEST = "checkpoint.json"
_TEMPORARY = ".unfinished-"


@contextmanager
def new_checkpoint(root: str | Path, number: int, state: dict[str, Any], keep: int) -> Iterator[Path]:
    """A block that writes the files of a checkpoint; once they are on the disk it is `root/checkpoint_<number>`.

    Then all but the `keep` newest checkpoints go. `state` (plain JSON) goes into the manifest. Checkpoints of the same
    or a higher number go: they belong to a run that was given up when this one resumed before them.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    clear_unfinished(root)
    folder = root / f"{_TEMPORARY}{number}"
    folder.mkdir()
    try:
        yield folder
        files = {str(file.relative_to(folder)): _fingerprint(file) for file in _files(folder)}
        (folder / MANIFEST).write_text(json.dumps({**state, "files": files}, indent=1), encoding="utf-8")
        for path in [*_files(folder), *(path for path in folder.rglob("*") if path.is_dir()), folder]:
            _flush(path)
    except BaseException:  # on a full disk its room is needed
        shutil.rmtree(folder, ignore_errors=True)
        raise
    for later in [path for path in checkpoints(root) if (_number(path) or 0) >= number]:
        _remove(later)
    folder.rename(root / f"checkpoint_{number}")
    _flush(root)
    for old in checkpoints(root)[:-keep]:
        _remove(old)


def save_tensors(value: Any, path: Path) -> None:
    """torch.save that raises OSError on a full disk, where torch's writer complains about positions in the file."""
    try:
        with open(path, "wb") as stream:
            torch.save(value, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The `state` of a checkpoint, after comparing every file with the manifest.

    Raises:
        ValueError: a damaged checkpoint, or a folder that is none; the message names the newest good one before it.
    """
    folder = Path(folder)
    problem = _problem(folder)
    if problem is None:
        state = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        del state["files"]
        return state
    good = next((str(one) for one in reversed(_before(folder)) if _problem(one) is None), None)
    remedy = f"resume from {good}" if good else "start anew, there is no good one before it"
    raise ValueError(f"checkpoint {folder} is damaged ({problem}): {remedy}")


def checkpoints(root: str | Path) -> list[Path]:
    """The checkpoint folders in `root`, oldest first."""
    root = Path(root)
    found = [path for path in root.iterdir() if _number(path) is not None] if root.is_dir() else []
    return sorted(found, key=lambda path: _number(path) or 0)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest in it or in its `checkpoints/`.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path).expanduser()
    if path.is_dir() and _number(path) is not None:
        return path
    found = checkpoints(path) or checkpoints(path / "checkpoints")
    if not found:
        raise FileNotFoundError(f"no checkpoint to resume from in {path}: give a folder that holds checkpoint_<n>")
    return found[-1]


def clear_unfinished(root: str | Path) -> None:
    """Remove what a killed process left half written or half removed."""
    for path in Path(root).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def rng_state() -> dict[str, Any]:
    """States of the random-number generators of Python, NumPy and torch (CPU, and the current GPU if there is one).

    Loadable with weights_only. One GPU: that of this process; each process of a run keeps its own.
    """
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned.

    Raises:
        ValueError: one of the two machines has a GPU, and the other has none.
    """
    if bool(state["cuda"]) != torch.cuda.is_available():
        where = "with" if state["cuda"] else "without"
        raise ValueError(f"the checkpoint was made {where} a GPU, whose random numbers are others: resume it likewise")
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy_keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", numpy_keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    for gpu_state in state["cuda"]:
        torch.cuda.set_rng_state(gpu_state)


def _number(path: Path) -> int | None:
    match = re.fullmatch(r"checkpoint_(\d+)", path.name)
    return int(match[1]) if match else None


def _before(folder: Path) -> list[Path]:
    number = _number(folder)
    return [one for one in checkpoints(folder.parent) if number is None or (_number(one) or 0) < number]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _fingerprint(folder / name) != expected:
            return f"{name} is not what was written"
    return None


def _remove(folder: Path) -> None:
    """Rename first: half a checkpoint must never bear a checkpoint's name."""
    doomed = folder.with_name(f"{_TEMPORARY}removed-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
