"""The machine and its highest rates, and the compilation of csrc/ in the background."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from alignprop_fast.ops import extension
from alignprop_fast.runtime import HostPool, link_rate
from benchmarks.gpu_sections.lab import Lab, host_bytes
from benchmarks.gpu_sections.timing import Call, in_turns

PACKAGES = ("diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "xformers", "triton", "numpy")


def build(lab: Lab) -> None:
    """Compile csrc/ for this GPU. A dry run only names the compilers."""
    arches = extension.present_arches()
    library = extension.library_path(arches)
    lab.facts.write("build", "compiler", nvcc=extension.find_nvcc(), cxx=shutil.which("c++"), arches=arches)
    if lab.dry:
        return
    there, began = library.exists(), time.perf_counter()
    extension.build(library, arches)
    lab.facts.write("build", "library", seconds=time.perf_counter() - began, was_there=there, file=library.name)


def machine(lab: Lab) -> None:
    """Versions, memory, and the rates of a matrix product, a copy and the host link."""
    device = lab.device
    lab.facts.write("machine", "versions", python=platform.python_version(), driver=_driver(), **_versions())
    lab.facts.write("machine", "host", bytes=host_bytes(), cores=os.cpu_count(), cpu=_cpu())
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        lab.facts.write("machine", "device memory", free_bytes=free, total_bytes=total)
    lab.rate()
    _copies(lab)
    if device.type == "cuda":
        pool = HostPool(device)
        buffer = pool.take(2**20)
        lab.facts.write("machine", "registered buffer", bytes=buffer.size_bytes, locked=pool.limit_bytes is None)
        lab.facts.write("machine", "link", to_device_bytes_per_second=link_rate(device))


def _copies(lab: Lab) -> None:
    """Bytes/s of a copy on the device (read plus written), and host microseconds to launch a small kernel."""
    n = 2**20 if lab.dry else 2**30
    source, target = (torch.zeros(n, dtype=torch.uint8, device=lab.device) for _ in range(2))
    small = torch.zeros(64, device=lab.device)
    copy, launch = Call("copy", lambda: target.copy_(source)), Call("launch", lambda: small.add_(1))
    in_turns([copy, launch], lab.device, 20, 1.0)
    lab.facts.write("machine", "copy", bytes_per_second=2 * n / copy.figures(1)["seconds"])
    lab.facts.write("machine", "launch", host_seconds=launch.figures(1)["host_seconds"])


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
