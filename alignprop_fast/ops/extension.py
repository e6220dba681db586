"""Builds the C++ and CUDA kernels of csrc/ with ninja and loads them.

The library uses only PyTorch's stable ABI, so one build serves torch 2.10 and later. It is built when the package is
installed, if torch can be imported then. Otherwise the first CUDA tensor builds it for the GPUs of this machine, into
torch's extension cache; so does `python -m alignprop_fast.ops.extension`. CPU tensors use an existing library and never
start a build, because ten seconds of compiling cost a short run more than the kernels save. A missing compiler raises
no error: `missing` gives the reason.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
INSTALLED = Path(__file__).parent  # where setup.py puts a library, if it builds one
TOOLKIT = Path("/usr/local/cuda")
ARCHES = ("80", "86", "89", "90", "100", "120")  # of an installed library, if nvcc knows them
CXX_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
# The oldest torch that the library must run under.
ABI_FLAGS = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)

log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The kernels could not be built; the message is one line that says why."""


def nvcc_command(nvcc: str, arches: Collection[str], source: Path | str, output: Path | str) -> list[str]:
    """The command that compiles a CUDA file of csrc/ to an object file for sm_`arches`, without torch headers.

    It adds PTX for the newest of them, which the driver compiles for newer GPUs.
    """
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches]
    gencode += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in sorted(arches, key=int)[-1:]]
    return [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC", *gencode, "-c", str(source), "-o", str(output)]


def find_nvcc() -> str | None:
    """The CUDA compiler of $CUDA_HOME, the search path, /usr/local/cuda or the packages that torch brought."""
    home = os.environ.get("CUDA_HOME")
    packages = Path(torch.__file__).parents[1] / "nvidia" / f"cu{(torch.version.cuda or '').split('.')[0]}"
    folders = [f"{home}/bin"] if home else []
    folders += [os.environ.get("PATH", os.defpath), f"{TOOLKIT}/bin", f"{packages}/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def present_arches() -> tuple[str, ...]:
    """Compute capabilities of the GPUs present, such as ("89",); none for a CPU build of torch."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return ()
    devices = range(torch.cuda.device_count())
    return tuple(sorted({"".join(map(str, torch.cuda.get_device_capability(i))) for i in devices}))


def known_arches() -> tuple[str, ...]:
    """Those `ARCHES` that the CUDA compiler knows; none without a compiler or for a CPU build of torch."""
    nvcc = find_nvcc()
    if torch.version.cuda is None or nvcc is None:
        return ()
    return tuple(arch for arch in ARCHES if arch in _arches_of(nvcc))


def _arches_of(nvcc: str) -> list[str]:
    """Every compute capability that this compiler knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [name.removeprefix("compute_") for name in listed]


def compiled_arches(arches: Collection[str], known: Collection[str]) -> tuple[str, ...]:
    """The architectures to compile for these GPUs; for a GPU newer than nvcc knows, the newest that it knows."""
    newest = max(known, key=int, default="0")
    return tuple(sorted({newest if known and int(newest) < int(arch) else arch for arch in arches}, key=int))


def library_name(arches: Iterable[str]) -> str:
    """File name of a library for these GPUs; `installed` reads it."""
    return "-".join(["compiled", *(f"sm_{arch}" for arch in arches)]) + ".so"


def installed(arches: tuple[str, ...]) -> Path | None:
    """The library beside this file, if its code runs on all of `arches`.

    It also runs on later GPUs of the same major version and, through PTX (`nvcc_command`), on all newer ones.
    """
    for library in sorted(INSTALLED.glob("compiled*.so")):
        built = [name.removeprefix("sm_") for name in library.stem.split("-")[1:]]
        newest = max(map(int, built), default=None)
        if all(
            (newest is not None and newest < int(a)) or any(b[:-1] == a[:-1] and b[-1] <= a[-1] for b in built)
            for a in arches
        ):
            return library
    return None


def library_path(arches: tuple[str, ...]) -> Path:
    """The library's path in the cache, for these sources and GPUs (none: only the CPU version)."""
    digest = hashlib.sha256(repr((CXX_FLAGS, ABI_FLAGS, nvcc_command("nvcc", arches, "", ""))).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_home / "torch_extensions")
    return root / f"alignprop_fast-{digest.hexdigest()[:16]}" / library_name(arches)


def build(library: Path, arches: tuple[str, ...]) -> None:
    """Compile csrc/ to `library`, for `arches`; without any, only the CPU version.

    Processes that ask for the same library wait for the first. Raises BuildError.
    """
    if not sys.platform.startswith("linux"):
        raise BuildError("kernels are built on Linux only")
    import fcntl

    try:
        folder = library.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        # The system's lock ends with its process, however that ends.
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _run_ninja(folder, arches)
                os.replace(folder / "linked.so", library)
    except OSError as error:
        raise BuildError(f"cannot build in {library.parent} ({error.strerror})") from error


def _run_ninja(folder: Path, arches: tuple[str, ...]) -> None:
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    nvcc = find_nvcc() if arches else None
    # These packages fit torch: from CUDA 13 on, pip keeps the version of cuda-toolkit that torch installed.
    toolkit = "nvcc (pip install 'cuda-toolkit[nvcc,crt,nvvm,cccl]', or the CUDA toolkit)"
    wanted = {"ninja (pip install ninja)": ninja, "C++ compiler": cxx, toolkit: nvcc if arches else "unused"}
    if absent := [name for name, found in wanted.items() if not found]:
        raise BuildError(f"no {' and no '.join(absent)}")
    log.warning("building C++%s kernels, about %d s, once", "/CUDA" if arches else "", 15 if arches else 10)
    targets = compiled_arches(arches, _arches_of(nvcc)) if nvcc else ()
    (folder / "build.ninja").write_text(_ninja_file(str(cxx), nvcc, targets))
    result = subprocess.run([str(ninja), "linked.so"], cwd=folder, capture_output=True, text=True)
    if result.returncode:
        (folder / "build.log").write_text(result.stdout + result.stderr)
        raise BuildError(f"the compiler failed, see {folder / 'build.log'}")


def _ninja_file(cxx: str, nvcc: str | None, arches: tuple[str, ...]) -> str:
    torch_dir = Path(torch.__file__).parent
    suffixes = {".cpp", ".cu"} if nvcc else {".cpp"}
    objects = {path.name + ".o": path for path in sorted(SOURCES.iterdir()) if path.suffix in suffixes}
    flags = [*CXX_FLAGS, *ABI_FLAGS, *(["-DUSE_CUDA"] if nvcc else []), f"-isystem {_escape(torch_dir / 'include')}"]
    libraries = [f"-L{_escape(torch_dir / 'lib')}", "-ltorch_cpu"]
    if nvcc:
        # pip's packages have CUDA's runtime in lib, but nvcc looks in lib64.
        libraries += ["-ltorch_cuda", f"-L{_escape(Path(nvcc).parents[1] / 'lib')}"]
    # The same C++ compiler for all files, because nvcc by default ignores $CXX.
    host = "" if " " in cxx else f" -ccbin {cxx}"
    linker = f"{nvcc} -shared -cudart static{host}" if nvcc else f"{cxx} -shared"
    lines = [
        f"rule cxx\n  command = {cxx} {' '.join(flags)} -c $in -o $out",
        f"rule cuda\n  command = {' '.join(nvcc_command(nvcc or 'nvcc', arches, '$in', '$out'))}{host}",
        f"rule link\n  command = {linker} $in {' '.join(libraries)} -o $out",
        *(f"build {o}: {'cuda' if path.suffix == '.cu' else 'cxx'} {_escape(path)}" for o, path in objects.items()),
        f"build linked.so: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


@cache
def missing(device_type: str) -> str | None:
    """None if the compiled kernels serve tensors on "cpu" or "cuda", else the reason in one line.

    The first CUDA tensor builds them if needed, which takes seconds. A failed build is logged once.
    """
    if device_type not in ("cpu", "cuda"):
        return f"no kernels for {device_type}"
    arches = present_arches()
    if device_type == "cuda" and not arches:
        return "no GPU at hand"
    library = installed(arches) or library_path(arches)
    try:
        if device_type == "cuda" and not library.exists():
            build(library, arches)
        if not library.exists():
            return "not built (python -m alignprop_fast.ops.extension builds it)"
        _load(library, device_type)
    except (BuildError, OSError) as error:
        log.warning("slower group norm (PyTorch's own, which leaves channels_last): %s", error)
        return str(error)
    return None


def _load(library: Path, device_type: str) -> None:
    """Raises BuildError if the driver cannot run the library, because it is older than the compiler's CUDA."""
    torch.ops.load_library(str(library))
    if device_type == "cuda":
        ask = ctypes.CDLL(str(library)).alignprop_fast_cuda_error
        ask.restype = ctypes.c_char_p
        error: bytes | None = ask()
        if error is not None:
            raise BuildError(f"the kernels do not run here: {error.decode()}")


def main() -> int:
    """Build for this machine. Returns the exit code."""
    arches = present_arches()
    library = library_path(arches)
    try:
        build(library, arches)
        _load(library, "cuda" if arches else "cpu")
    except (BuildError, OSError) as error:
        print(f"not usable: {error}", file=sys.stderr)
        return 1
    print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
