"""Compiles CUDA sources for the CPU, and gives them memory that detects accesses beyond its ends."""

import ctypes
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from alignprop_fast.ops.extension import ABI_FLAGS, SOURCES

STAND_IN = Path(__file__).parent
# Detect what a GPU would reject or what compilers handle differently: misaligned vectors, overflow, local arrays read
# beyond their ends or before they are set.
CHECKS = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-ftrivial-auto-var-init=pattern")
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-w", *CHECKS)


def for_the_cpu(source: str) -> str:
    """CUDA source in which only the parts are changed that C++ compilers cannot read: launches and shared memory."""
    bounds = {kernel: bound for bound, kernel in re.findall(r"__launch_bounds__\((\w+)[^)]*\) (\w+)\(", source)}

    def launch(match: re.Match[str]) -> str:
        kernel, instance, configuration, arguments = match.groups()
        return f"cuda_on_cpu::launch({bounds[kernel]}, {configuration}, [&] {{ {kernel}{instance}({arguments}); }});"

    source = re.sub(r"(\w+)((?:<[^<>]*>)?)<<<(.*)>>>\((.*)\);", launch, source)
    shared = r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];"
    return re.sub(shared, r"auto* \2 = reinterpret_cast<\1*>(cuda_on_cpu::shared_memory);", source)


def for_cpu_tensors(bindings: str) -> str:
    """bindings.cpp with the CUDA version instead of the CPU version, and with a name of its own."""
    return (
        bindings.replace("_FRAGMENT(alignprop_fast,", "_FRAGMENT(alignprop_fast_cuda_on_cpu,")
        .replace("_IMPL(alignprop_fast, CPU,", "_IMPL(alignprop_fast_cuda_on_cpu, XPU,")
        .replace("_IMPL(alignprop_fast, CUDA,", "_IMPL(alignprop_fast_cuda_on_cpu, CPU,")
    )


def build(cache: pytest.Cache, name: str, sources: dict[str, str], with_torch: bool) -> Path:
    """A shared library of `sources` (text by name), kept in pytest's cache; skips the test without g++."""
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no g++" if compiler is None else "fibers and traps need Linux")
    # -Bsymbolic selects the stand-ins in entry.cpp instead of torch's functions of the same name.
    flags = [*FLAGS, "-shared", "-Wl,-Bsymbolic", f"-I{STAND_IN}", f"-I{SOURCES}"]
    libraries = []
    if with_torch:
        folder = Path(torch.__file__).parent
        flags += ["-DUSE_CUDA", *ABI_FLAGS, f"-isystem{folder}/include"]
        libraries = [f"-L{folder}/lib", "-ltorch_cpu"]
    headers = [path.read_text() for folder in (STAND_IN, SOURCES) for path in sorted(folder.glob("*.h"))]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((version, flags, sources, headers)).encode()).hexdigest()[:16]
    folder = cache.mkdir("cuda_on_cpu")
    library = folder / f"{name}-{digest}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as building:
        paths = [Path(building, source) for source in sources]
        for path in paths:
            path.write_text(sources[path.name])
        command = [compiler, *flags, *map(str, paths), *libraries, "-o", f"{building}/built.so"]
        built = subprocess.run(command, capture_output=True, text=True)
        if "_Float16" in built.stderr or "-ftrivial-auto-var-init" in built.stderr:
            pytest.skip("g++ is older than 12")
        assert built.returncode == 0, built.stderr
        for old in folder.glob(f"{name}-*.so"):
            old.unlink()
        os.replace(f"{building}/built.so", library)
    return library


class Memory:
    """Tensors between protected pages: they end or begin exactly at a page's edge."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.around: list[torch.Tensor] = []

    def place(self, values: torch.Tensor, alignment: int = 16) -> torch.Tensor:
        """A copy of `values` aligned to exactly `alignment` bytes; the rest of the pages is NaN."""
        page = mmap.PAGESIZE
        size = values.numel() * values.element_size()
        inner = (size + alignment + page - 1) // page * page
        pages = mmap.mmap(-1, inner + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        for edge in (start, start + page + inner):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(edge), page, 0) == 0
        middle = torch.frombuffer(pages, dtype=torch.uint8, offset=page, count=inner).fill_(0xFF)
        offset = (inner - size) // alignment * alignment if self.at_end else 0
        if alignment < 16 and offset % 16 == 0:
            offset += -alignment if self.at_end else alignment
        self.around += [middle[:offset], middle[offset + size :]]
        placed = middle[offset : offset + size].view(values.dtype).view(values.shape)
        return placed.copy_(values)

    def untouched(self) -> bool:
        """Whether nothing was written around the tensors."""
        return all(bool((part == 0xFF).all()) for part in self.around)
