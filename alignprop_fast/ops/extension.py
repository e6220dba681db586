"""Builds the C++ and CUDA kernels of csrc/ with ninja and loads them; `python -m alignprop_fast.ops.extension` builds now.

The library uses PyTorch's stable ABI alone, so one build serves torch 2.10 and later. It is made when the package is
installed if torch is at hand then; else for CUDA tensors on first use, for the GPUs of this machine alone, into torch's
extension cache. CPU tensors take what is there already and never start a build: a compiler run of ten seconds would
cost a short run more than the kernels save. Nothing here raises for want of a compiler: `missing` says what is lost.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
INSTALLED = Path(__file__).with_name("compiled.so")
ARCHES = ("80", "86", "89", "90", "100", "120")  # of an installed library
CXX_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
# The oldest torch that the library must run under.
ABI_FLAGS = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)

log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The kernels could not be built; the message is one line that says why."""


def nvcc_command(nvcc: str, arches: Iterable[str], source: Path | str, output: Path | str) -> list[str]:
    """The command that compiles a CUDA file of csrc/ to an object file for sm_`arches`; it needs no torch headers."""
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches]
    return [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC", *gencode, "-c", str(source), "-o", str(output)]


def find_nvcc() -> str | None:
    """The CUDA compiler of $CUDA_HOME, of the search path or of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    found = home and shutil.which("nvcc", path=f"{home}/bin")
    return found or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def present_arches() -> tuple[str, ...]:
    """Compute capabilities of the GPUs at hand, ("89",) say; none for a CPU build of torch."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return ()
    devices = range(torch.cuda.device_count())
    return tuple(sorted({"".join(map(str, torch.cuda.get_device_capability(i))) for i in devices}))


def library_path(arches: tuple[str, ...]) -> Path:
    """Where the cache keeps the library of these sources for these GPUs (none: the CPU version alone)."""
    digest = hashlib.sha256(repr((CXX_FLAGS, ABI_FLAGS, nvcc_command("nvcc", arches, "", ""))).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_home / "torch_extensions")
    name = "-".join(f"sm_{arch}" for arch in arches) or "cpu"
    return root / f"alignprop_fast-{digest.hexdigest()[:16]}" / name / "compiled.so"


def build(library: Path, arches: tuple[str, ...]) -> None:
    """Compile csrc/ to `library`, for `arches` or, if there are none, the CPU version alone.

    Processes that ask for the same library wait for the first. Raises BuildError.
    """
    if not sys.platform.startswith("linux"):
        raise BuildError("kernels are built on Linux only")
    import fcntl

    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        # A lock of the system: it goes with its process, however that ends.
        with open(library.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _run_ninja(library, arches)
    except OSError as error:
        raise BuildError(f"cannot write to {library.parent} ({error.strerror})") from error


def _run_ninja(library: Path, arches: tuple[str, ...]) -> None:
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    nvcc = find_nvcc() if arches else None
    wanted = {"ninja (pip install ninja)": ninja, "a C++ compiler": cxx, "nvcc": nvcc if arches else "unused"}
    if absent := [name for name, found in wanted.items() if not found]:
        raise BuildError(f"no {' and no '.join(absent)}")
    log.warning("building C++%s kernels, about %d s, once", "/CUDA" if arches else "", 40 if arches else 10)
    (library.parent / "build.ninja").write_text(_ninja_file(str(cxx), nvcc, arches))
    result = subprocess.run([str(ninja), "linked.so"], cwd=library.parent, capture_output=True, text=True)
    if result.returncode:
        (library.parent / "build.log").write_text(result.stdout + result.stderr)
        raise BuildError(f"the compiler failed, see {library.parent / 'build.log'}")
    os.replace(library.parent / "linked.so", library)


def _ninja_file(cxx: str, nvcc: str | None, arches: tuple[str, ...]) -> str:
    torch_dir = Path(torch.__file__).parent
    suffixes = {".cpp", ".cu"} if nvcc else {".cpp"}
    objects = {path.name + ".o": path for path in sorted(SOURCES.iterdir()) if path.suffix in suffixes}
    flags = [*CXX_FLAGS, *ABI_FLAGS, *(["-DUSE_CUDA"] if nvcc else []), f"-isystem {_escape(torch_dir / 'include')}"]
    libraries = [f"-L{_escape(torch_dir / 'lib')}", "-ltorch_cpu", *(["-ltorch_cuda"] if nvcc else [])]
    linker = f"{nvcc} -shared -cudart static" if nvcc else f"{cxx} -shared"
    lines = [
        f"rule cxx\n  command = {cxx} {' '.join(flags)} -c $in -o $out",
        f"rule cuda\n  command = {' '.join(nvcc_command(nvcc or 'nvcc', arches, '$in', '$out'))}",
        f"rule link\n  command = {linker} $in {' '.join(libraries)} -o $out",
        *(f"build {o}: {'cuda' if path.suffix == '.cu' else 'cxx'} {_escape(path)}" for o, path in objects.items()),
        f"build linked.so: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


@cache
def missing(device_type: str) -> str | None:
    """None if the compiled kernels serve tensors on "cpu" or "cuda", else why not, in one line.

    On the first CUDA tensor it builds them where needed, which takes seconds; what could not be built is logged once.
    """
    if device_type not in ("cpu", "cuda"):
        return f"no kernels for {device_type}"
    arches = () if INSTALLED.exists() else present_arches()
    if device_type == "cuda" and not INSTALLED.exists() and not arches:
        return "no GPU at hand"
    library = INSTALLED if INSTALLED.exists() else library_path(arches)
    try:
        if device_type == "cuda" and library != INSTALLED:
            build(library, arches)
        if not library.exists():
            return "not built (python -m alignprop_fast.ops.extension builds it)"
        torch.ops.load_library(str(library))
    except (BuildError, OSError) as error:
        log.warning("slower group norm (PyTorch's own, which leaves channels_last): %s", error)
        return str(error)
    return None if _serves(device_type) else f"the installed library has no {device_type} version"


def _serves(device_type: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        "alignprop_fast::group_norm_silu_forward", device_type.upper()
    )


def main() -> int:
    """Build for this machine. Returns the exit code."""
    arches = present_arches()
    library = library_path(arches)
    try:
        build(library, arches)
    except BuildError as error:
        print(f"not built: {error}", file=sys.stderr)
        return 1
    print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
