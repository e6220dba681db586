"""Facts about the machine: versions, driver, compilers, the device and its memory."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from alignprop_fast.doctor.report import Fact
from alignprop_fast.ops import attention_packages, extension
from alignprop_fast.planner.host_memory import lockable_bytes
from alignprop_fast.version import __version__

GIB = 2**30
PACKAGES = ("diffusers", "transformers", "peft", "accelerate")
# Packages that help on a GPU, and their use.
OPTIONAL = {
    "triton": "the package's fused kernels",
    "bitsandbytes": "8-bit optimizers and base models",
    "xformers": "comparison in benchmarks only",
}


def software(device: torch.device) -> Iterator[Fact]:
    """Versions and compilers, with a remedy if something that `device` uses is missing."""
    gpu = device.type == "cuda"
    yield _software("alignprop-fast", __version__)
    yield _software("Python", f"{platform.python_version()}, {platform.platform()}")
    yield _software("torch", f"{torch.__version__}, CUDA {torch.version.cuda or torch.version.hip or 'none'}")
    if gpu:
        yield _software("cuDNN", str(torch.backends.cudnn.version() or "none"))
    for name in PACKAGES:
        yield _software(name, _version(name) or "not installed")
    for name, use in OPTIONAL.items():
        found = _version(name)
        missing = gpu and found is None and name != "xformers"
        yield _software(name, found or "not installed", f"pip install {name}, for {use}" if missing else None)
    if gpu:
        yield from attention_packages_found()
    yield _software("NVIDIA driver", _driver() or "none")
    yield from _compilers(gpu)


def attention_packages_found() -> Iterator[Fact]:
    """FlashAttention 3 and 4: found, or why they cannot be used. Nothing is lost without them."""
    modules = {"FlashAttention 3": attention_packages.FLASH3, "FlashAttention 4": attention_packages.FLASH4}
    for name, module in modules.items():
        yield _software(name, attention_packages.fault(module) or "found")


def _compilers(gpu: bool) -> Iterator[Fact]:
    """Triton compiles with a C compiler and Python's header; csrc/ with a C++ compiler, ninja and nvcc."""
    wanted = {
        "C compiler": (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"), "apt install gcc"),
        "C++ compiler": (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++"), "apt install g++"),
        "Python.h": (_header(), "apt install python3-dev, or your Python's package of headers"),
        "ninja": (shutil.which("ninja", path=_search_path()), "pip install ninja"),
        "CUDA compiler": (_nvcc(), "pip install 'cuda-toolkit[nvcc,crt,nvvm,cccl]', or the CUDA toolkit"),
    }
    for name, (found, remedy) in wanted.items():
        yield _software(name, found or "none", remedy if gpu and not found else None)


def memory_of(device: torch.device) -> Iterator[Fact]:
    """The device, its memory, and host memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        yield Fact("device", "GPU", f"{properties.name}, compute capability {properties.major}.{properties.minor}")
        yield _size("memory", total)
        yield _size("free memory", free)
    else:
        threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        yield Fact("device", "CPU", f"{platform.processor() or platform.machine()}, {threads}")
    yield _size("host memory that may be pinned", lockable_bytes())


def unusable_gpu() -> Fact | None:
    """A GPU of this machine that torch cannot use; None if there is no GPU or torch can use it."""
    if torch.cuda.is_available() or not (_driver() or Path("/dev/nvidiactl").exists()):
        return None
    if torch.version.cuda is None:
        return Fact(
            *("device", "CUDA", f"there is an NVIDIA GPU, but this torch ({torch.__version__}) is built without CUDA"),
            wrong=True,
            remedy="install torch for CUDA: see pytorch.org, or --device cpu",
        )
    return Fact(
        *("device", "CUDA", f"torch for CUDA {torch.version.cuda} cannot use the GPU: {_cuda_error()}"),
        wrong=True,
        remedy="update the NVIDIA driver, or install a torch for an older CUDA",
    )


def _software(name: str, value: str, remedy: str | None = None) -> Fact:
    return Fact("software", name, value, remedy=remedy)


def _size(name: str, size_bytes: int) -> Fact:
    return Fact("device", name, f"{size_bytes / GIB:.2f} GiB", size_bytes)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _header() -> str | None:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return str(header) if header.exists() else None


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def _nvcc() -> str | None:
    nvcc = extension.find_nvcc()
    if nvcc is None:
        return None
    releases = [line for line in _said(nvcc, "--version").splitlines() if "release" in line]
    return f"{nvcc}, {releases[0].partition('release ')[2]}" if releases else nvcc


def _driver() -> str | None:
    """The driver's version, from its tool or the kernel's file."""
    tool = shutil.which("nvidia-smi")
    said = "" if tool is None else _said(tool, "--query-gpu=driver_version", "--format=csv,noheader").strip()
    if said and "\n" not in said.partition("\n")[0] and said[0].isdigit():
        return said.partition("\n")[0]
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), None)


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).partition("\n")[0]
    return "it sees none"


def _said(*command: str) -> str:
    """The output of a command; empty if it fails or takes too long."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
