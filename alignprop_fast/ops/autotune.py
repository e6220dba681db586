"""Autotuning: measures which of several correct implementations of a problem is fastest.

The results of each candidate are checked on the problem before it may win, and it is timed once per device and library
versions. Times are kept on disk. Failures are not, because the next process may have a compiler, memory or a driver.
"""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from filelock import FileLock

from alignprop_fast.files import cache_folder
from alignprop_fast.ops import switched_off
from alignprop_fast.ops.errors import is_out_of_memory
from alignprop_fast.version import __version__

REPETITIONS = 20
_OUT_OF_MEMORY = "out of memory"
# Their kernels are candidates.
_LIBRARIES = ("triton", "flash_attn_3", "flash-attn-4")
_KERNELS = Path(__file__).parents[1] / "kernels"

_failures: dict[tuple[str, str], dict[str, str]] = {}
_choices: dict[tuple[torch.device, bool, int, Hashable], Any] = {}


Choice = TypeVar("Choice")


class Candidate(Protocol):
    """One implementation, prepared for one problem."""

    def run(self) -> object:
        """Run it once. Raises any error if it cannot serve this problem."""

    def fault(self) -> str | None:
        """The fault of its results on this problem, in a few words; None: no fault."""


Candidates = Mapping[str, Candidate]


def remembered(problem: Hashable, choose: Callable[..., Choice], device: torch.device, *arguments: Any) -> Choice:
    """choose(*arguments), asked once for each problem, device and torch's flag for deterministic algorithms.

    It is asked again after an implementation was switched off, and each time while a CUDA graph is captured, where
    nothing can be measured.
    """
    key = device, torch.are_deterministic_algorithms_enabled(), len(switched_off.reasons), problem
    choice: Choice | None = _choices.get(key)
    if choice is None:
        choice = choose(*arguments)
        if not _is_capturing(device):
            _choices[key] = choice
    return choice


def fastest(problem: str, offered: Candidates, device: torch.device) -> str:
    """Name of the fastest candidate with correct results on this problem.

    Candidates are checked and timed on first use. The times are remembered in the user's cache folder, by device and
    versions. Nothing can be timed while a CUDA graph is captured: a new problem then gets the first candidate. Under
    torch's flag for deterministic algorithms the first candidate with correct results is used, regardless of its time.

    Args:
        problem: operator, direction, dtype and shape, which distinguish this problem from others.
        offered: the implementations by name; the first is used without a trial. Others are never chosen, even if they
            are remembered.
        device: where they run.

    Raises:
        RuntimeError: no candidate gave a correct result; the message has the reason for each.
        torch.OutOfMemoryError: the same, but one of them might succeed with more memory.
    """
    key = device_name(device)
    if _is_capturing(device):
        return _best(_table(key).get(problem, {}), offered) or next(iter(offered))
    _measure(key, problem, offered, device)
    return _best(_table(key)[problem], offered) or _refuse(problem, _failures.pop((key, problem)))


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def explain(problem: str, device: torch.device) -> str:
    """The times, in milliseconds, behind a choice of `fastest`; for a failed or wrong candidate, the reason."""
    key = device_name(device)
    lines = [f"{name} {time:.3f} ms" for name, time in _table(key).get(problem, {}).items()]
    lines += [f"{name}: {reason}" for name, reason in _failures.get((key, problem), {}).items()]
    return f"{problem} on {key}: " + (", ".join(lines) or "not measured yet")


def forget() -> None:
    """Read the tables from disk again and forget failures, for tests."""
    _table.cache_clear()
    _failures.clear()
    _choices.clear()


def difference(found: Sequence[Any], plain: Sequence[Any], exact: Sequence[Any], relative: float = 0.0) -> float:
    """The largest ratio of an error of `found` to the allowed error. Above 1, or NaN: wrong.

    Allowed is twice the error of `plain`, plus 1e-6.

    Args:
        found: results of an implementation, all tensors.
        plain: results of the plain PyTorch expression in the same dtype.
        exact: results in float64 from the same inputs.
        relative: also allow this share of the largest exact value.
    """
    ratios = [
        (f - e).abs().max() / (2 * (p - e).abs().max() + relative * e.abs().max() + 1e-6)
        for f, p, e in zip(found, plain, exact, strict=True)
    ]
    return torch.stack(ratios).max().item()


def _measure(key: str, problem: str, offered: Candidates, device: torch.device) -> None:
    """Time the candidates that have no time yet; times go into the table, failures into `_failures`."""
    times = _table(key).setdefault(problem, {})
    failures = _failures.setdefault((key, problem), {})
    new = [name for name in offered if name not in times and name not in failures]
    for name in new:
        result = _milliseconds(problem, name, offered[name], device)
        if isinstance(result, float):
            times[name] = result
        else:
            failures[name] = result
    if any(name in times for name in new):
        _save(key, problem, times)


def _best(times: Mapping[str, float], offered: Candidates) -> str | None:
    timed = [name for name in offered if name in times]
    if torch.are_deterministic_algorithms_enabled():  # bits must not depend on times
        return next(iter(timed), None)
    return min(timed, key=lambda name: times[name], default=None)


def _refuse(problem: str, failures: Mapping[str, str]) -> str:
    message = f"nothing can run {problem}: {dict(failures)}"
    raise torch.OutOfMemoryError(message) if _OUT_OF_MEMORY in failures.values() else RuntimeError(message)


def _milliseconds(problem: str, name: str, candidate: Candidate, device: torch.device) -> float | str:
    """Median time of a candidate, or one line that says why it cannot be used."""
    try:
        fault = candidate.fault()
        if fault is None:
            candidate.run()
            times = sorted(_gpu_times(candidate.run, device) if device.type == "cuda" else _cpu_times(candidate.run))
            return times[len(times) // 2]
    except Exception as error:  # compilers, drivers and libraries raise anything
        if is_out_of_memory(error):
            return _OUT_OF_MEMORY
        return str(error).partition("\n")[0][:120] or type(error).__name__
    switched_off.switch_off(f"{problem}: {name}", fault)
    return fault


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


def device_name(device: torch.device) -> str:
    """The device with the versions, the sources of our kernels and the mode that affect its speed."""
    mode = ", deterministic" if torch.are_deterministic_algorithms_enabled() else ""
    return _device_and_versions(device) + mode


@cache
def _device_and_versions(device: torch.device) -> str:
    libraries = [f"{name} {found}" for name in _LIBRARIES if (found := _version(name)) is not None]
    ours = f"alignprop_fast {__version__}, kernels {source_digest(_KERNELS)}"
    versions = ", ".join([f"torch {torch.__version__}", *libraries, ours])
    if device.type != "cuda":
        return f"{platform.machine()}, {versions}"
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return f"{torch.cuda.get_device_name(device)}, {versions}, cuDNN {torch.backends.cudnn.version()}, driver {driver}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def source_digest(folder: Path) -> str:
    """Changes with any source file in the folder: what was measured or checked before may no longer hold."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _file(key: str) -> Path:
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in key)
    return cache_folder() / f"{name}.json"


@cache
def _table(key: str) -> dict[str, dict[str, float]]:
    """Measured times by problem and candidate, read from disk once."""
    return _read(_file(key))


def _read(path: Path) -> dict[str, dict[str, float]]:
    """The times in a file; entries that are not valid times are ignored."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    problems = content if isinstance(content, dict) else {}
    return {
        problem: {name: float(time) for name, time in times.items() if _is_time(time)}
        for problem, times in problems.items()
        if isinstance(times, dict)
    }


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


def _save(key: str, problem: str, times: Mapping[str, float]) -> None:
    """Put the times of one problem into the file, and keep those that other processes wrote.

    If the cache folder cannot be written, the next process must only measure again.
    """
    path = _file(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=10):
            table = _read(path)
            table[problem] = {**table.get(problem, {}), **times}
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(table, indent=1), encoding="utf-8")
            os.replace(temporary, path)
    except (OSError, NotImplementedError):  # file systems without locks raise the latter
        return
