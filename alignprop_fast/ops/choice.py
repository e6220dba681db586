"""Measured choice: the fastest of several implementations of one problem, timed once per device and kept on disk."""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import torch

Candidates = Mapping[str, Callable[[], object]]

REPETITIONS = 20


def fastest(problem: str, candidates: Callable[[], Candidates], device: torch.device) -> str:
    """Name of the candidate that took the least time on this problem.

    Timed on first use and remembered in the user's cache folder, by device and library versions. While a CUDA graph is
    being captured nothing can be timed: a problem that is new then gets the first candidate, and is not remembered.

    Args:
        problem: what distinguishes this problem from others: operator, direction, dtype, shape.
        candidates: makes the implementations by name, ready to be called; one that cannot serve the problem raises.
        device: where they run.

    Raises:
        RuntimeError: no candidate could run; the message has each one's reason.
        torch.OutOfMemoryError: of one that might run where there is more memory: nothing is remembered then.
    """
    table = _table(device_name(device))
    if problem not in table:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return next(iter(candidates()))
        results = {name: _milliseconds(fn, device) for name, fn in candidates().items()}
        if not any(isinstance(result, float) for result in results.values()):
            raise RuntimeError(f"nothing can run {problem}: {results}")
        table[problem] = results
        _save(device_name(device), table)
    times = {name: time for name, time in table[problem].items() if isinstance(time, float)}
    return min(times, key=lambda name: times[name])


def explain(problem: str, device: torch.device) -> str:
    """The times, in milliseconds, by which `fastest` chose; for a candidate that could not run, why."""
    results = _table(device_name(device)).get(problem, {})
    lines = [
        f"{name} {time:.3f} ms" if isinstance(time, float) else f"{name}: {time}" for name, time in results.items()
    ]
    return f"{problem} on {device_name(device)}: " + (", ".join(lines) or "not measured yet")


def _milliseconds(fn: Callable[[], object], device: torch.device) -> float | str:
    """Median time of fn, or the first line of why it cannot run."""
    try:
        fn()
        times = sorted(_gpu_times(fn, device) if device.type == "cuda" else _cpu_times(fn))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError, TypeError, ImportError) as error:
        return str(error).partition("\n")[0][:120] or type(error).__name__
    return times[len(times) // 2]


def _gpu_times(fn: Callable[[], object], device: torch.device) -> list[float]:
    stream = torch.cuda.current_stream(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPETITIONS + 1)]
    events[0].record(stream)
    for event in events[1:]:
        fn()
        event.record(stream)
    torch.cuda.synchronize(device)
    return [one.elapsed_time(two) for one, two in pairwise(events)]


def _cpu_times(fn: Callable[[], object]) -> list[float]:
    stamps = [time.perf_counter()]
    for _ in range(REPETITIONS):
        fn()
        stamps.append(time.perf_counter())
    return [1000 * (two - one) for one, two in pairwise(stamps)]


@cache
def device_name(device: torch.device) -> str:
    """The device with the versions that its speed depends on."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, torch {torch.__version__}, triton {triton}"


def cache_folder() -> Path:
    """The user's folder for what was measured on this machine."""
    return Path.home() / ".cache" / "alignprop_fast"


def _file(key: str) -> Path:
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in key)
    return cache_folder() / f"{name}.json"


@cache
def _table(key: str) -> dict[str, dict[str, float | str]]:
    """Measured times by problem and candidate; read from disk once."""
    try:
        return json.loads(_file(key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _save(key: str, table: dict[str, dict[str, float | str]]) -> None:
    """Write the table whole. A cache folder that cannot be written costs the next process its measurement, no more."""
    path = _file(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1)
        os.replace(temporary, path)
    except OSError:
        return
