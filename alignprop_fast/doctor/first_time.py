"""The short examination before the first training step on a GPU, once for each GPU and versions of the libraries.

It runs in its own process, so that a kernel that breaks the CUDA context or ends the process does not end the training.
The training's random numbers and memory are not touched either. Only a result without faults is remembered.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from alignprop_fast.files import cache_folder
from alignprop_fast.ops import extension, switched_off
from alignprop_fast.ops.autotune import device_name
from alignprop_fast.version import __version__

log = logging.getLogger(__name__)

# With compiling. It is less than the time that other processes of the run wait for this one (`processes.TIMEOUT`).
MOST_SECONDS = 300
MOST_ROUNDS = 8  # a new round starts when a kernel has broken the context of the last one


@dataclass(frozen=True)
class _Answer:
    """The answer of the other process: a short `Report`."""

    checks: int
    lost: bool
    off: dict[str, str]
    wrong: list[str]


def examine_once(device: torch.device, dtype: torch.dtype) -> None:
    """Switch off in this process what does not work on this GPU in this dtype. Logs one line and raises nothing.

    Does nothing if an earlier examination found no fault, or on other devices.
    """
    if device.type != "cuda":
        return
    if device.index is None:  # the other process has its own current device
        device = torch.device("cuda", torch.cuda.current_device())
    mark = _mark(device, dtype)
    if os.path.exists(mark):  # False, too, where the folder may not be read
        return
    begin, name = time.perf_counter(), torch.cuda.get_device_name(device)
    try:
        answer = _examined(device, dtype)
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        said = " ".join(str(error).split())[:160]
        log.warning("%s could not be examined (%s): see alignprop-fast doctor", name, said)
        return
    for implementation, reason in answer.off.items():
        switched_off.switch_off(implementation, reason)
    trouble = [*answer.off, *answer.wrong]
    found = f"not right: {'; '.join(trouble)}; see alignprop-fast doctor" if trouble else "all right"
    log.warning("%s examined, once: %d checks, %.0f s: %s", name, answer.checks, time.perf_counter() - begin, found)
    if not trouble:
        _remember(mark)


def _mark(device: torch.device, dtype: torch.dtype) -> Path:
    """The file that records a result without faults; its name depends on everything that could change the result."""
    kernels = "csrc" if extension.missing(device.type) is None else "without csrc"
    order = "deterministic" if torch.are_deterministic_algorithms_enabled() else "free"
    parts = ["examined", __version__, device_name(device), str(dtype), kernels, order]
    return cache_folder() / "".join(c if c.isalnum() or c in ".-" else "_" for c in " ".join(parts))


def _remember(mark: Path) -> None:
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:
        pass  # the next process examines again


def _examined(device: torch.device, dtype: torch.dtype) -> _Answer:
    """Start processes until one reaches the end, each without what broke the context of the one before."""
    off: dict[str, str] = {}
    ends = time.monotonic() + MOST_SECONDS
    for _ in range(MOST_ROUNDS):
        answer = _ask(device, dtype, off, max(1.0, ends - time.monotonic()))
        if answer.lost and not answer.checks:  # the GPU may allow only one process at a time
            raise ValueError(answer.wrong[0] if answer.wrong else "no second process can use it")
        if not answer.lost or answer.off == off:
            break
        off = answer.off
    return answer


def _ask(device: torch.device, dtype: torch.dtype, off: Mapping[str, str], seconds: float) -> _Answer:
    """The answer of one process within the given seconds.

    A whole report counts whatever the exit code is: a process can still crash as it ends, when threads of autograd
    have not let go of their objects.

    Raises:
        OSError, subprocess.SubprocessError, ValueError, KeyError: it could not start, took too long or gave no answer.
    """
    question = {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "off": dict(off),
    }
    # The other process may not find this package by itself.
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-m", "alignprop_fast.doctor.first_time"],
        input=json.dumps(question),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    try:
        report = json.loads(run.stdout)
    except ValueError:
        last = run.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"the examination ended with exit code {run.returncode}: {last}") from None
    return _Answer(len(report["checks"]), report["lost"], report["off"], report["wrong"])


def main() -> None:
    """Run as the other process: read the question from standard input, write only the report to standard output."""
    from alignprop_fast.doctor.examine import examine

    output, sys.stdout = sys.stdout, sys.stderr
    question = json.loads(sys.stdin.read())
    if question["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    for name, reason in question["off"].items():
        switched_off.switch_off(name, reason)
    dtype = getattr(torch, question["dtype"])
    # If the process dies, its last line says where.
    report = examine(torch.device(question["device"]), True, [dtype], tell=partial(print, flush=True))
    output.write(report.to_json())
    output.flush()


if __name__ == "__main__":
    main()
