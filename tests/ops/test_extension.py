"""The loader of csrc/: what it does without a compiler, with a broken one, and with two processes at once."""

import logging
import re
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from alignprop_fast.ops import extension

# Leaves a line in a log and an object file; slow enough for two builds to meet.
COMPILER = """#!/bin/sh
echo run >> {log}
sleep 0.3
while [ "$1" != "-o" ]; do shift; done
echo built > "$2"
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    extension.missing.cache_clear()
    yield tmp_path / "cache"
    extension.missing.cache_clear()


def compiler(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def test_a_cpu_tensor_never_starts_a_build(cache):
    if extension.installed(()) is not None:
        pytest.skip("a library is installed here")
    if torch.cuda.is_available():
        pytest.skip("the question is what happens without a GPU")
    assert extension.missing("cpu") == "not built (python -m alignprop_fast.ops.extension builds it)"
    assert extension.missing("cuda") == "no GPU at hand"
    assert not cache.exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels are built on Linux only")
def test_a_broken_compiler_is_reported_with_its_words(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", "#!/bin/sh\necho no such flag >&2\nexit 1\n"))
    library = extension.library_path(())
    with pytest.raises(extension.BuildError, match="the compiler failed, see"):
        extension.build(library, ())
    assert "no such flag" in (library.with_suffix("") / "build.log").read_text() and not library.exists()


def test_without_tools_it_names_them(cache, monkeypatch):
    monkeypatch.setattr(extension.shutil, "which", lambda name, path=None: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(extension.BuildError, match=r"^no ninja .pip install ninja. and no C\+\+ compiler$"):
        extension.build(extension.library_path(()), ())


def test_a_gpu_without_compiler_costs_one_line(cache, monkeypatch, caplog):
    monkeypatch.setattr(extension, "present_arches", lambda: ("89",))
    monkeypatch.setattr(extension, "find_nvcc", lambda: None)
    with caplog.at_level(logging.WARNING):
        reasons = [extension.missing("cuda") for _ in range(3)]
    said = "no nvcc (pip install 'cuda-toolkit[nvcc,crt,nvvm,cccl]', or the CUDA toolkit)"
    assert reasons == [said] * 3
    assert [r.getMessage() for r in caplog.records] == [
        f"slower group norm (PyTorch's own, which leaves channels_last): {said}"
    ]


def test_nvcc_of_the_packages_that_torch_brought(monkeypatch, tmp_path):
    monkeypatch.setattr(extension.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(extension.torch.version, "cuda", "13.0")
    monkeypatch.setattr(extension, "TOOLKIT", tmp_path / "toolkit")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert extension.find_nvcc() is None
    folders = [tmp_path / "nvidia" / "cu13", tmp_path / "toolkit", tmp_path / "home"]
    monkeypatch.setenv("CUDA_HOME", str(folders[-1]))
    for folder in folders:  # each goes before the last
        (folder / "bin").mkdir(parents=True)
        nvcc = compiler(folder / "bin" / "nvcc", "#!/bin/sh\n")
        assert extension.find_nvcc() == nvcc


def test_the_newest_gpu_is_compiled_to_ptx_too():
    flags = [f for f in extension.nvcc_command("nvcc", ("80", "90", "100"), "a.cu", "a.o") if "gencode" in f]
    codes = [flag.rpartition("=")[2] for flag in flags]
    assert codes == ["sm_80", "sm_90", "sm_100", "compute_100"]
    assert "arch=compute_100,code=compute_100" in flags[-1], "100 is newer than 90, whatever the alphabet says"
    assert not any("gencode" in word for word in extension.nvcc_command("nvcc", (), "a.cu", "a.o"))


@pytest.mark.parametrize(
    ("arches", "known", "compiled"),
    [
        (("89",), ("80", "89", "90"), ("89",)),
        (("89", "130"), ("80", "89", "100", "120"), ("89", "120")),
        # Too old for it: the compiler says so itself.
        (("70",), ("75", "80"), ("70",)),
        (("89",), (), ("89",)),
    ],
)
def test_a_gpu_that_the_compiler_is_too_old_for_gets_the_newest_ptx(arches, known, compiled):
    assert extension.compiled_arches(arches, known) == compiled


@pytest.mark.parametrize(("cxx", "host"), [("/opt/bin/g++-13", " -ccbin /opt/bin/g++-13"), ("ccache g++", "")])
def test_one_cpp_compiler_for_both_languages(cxx, host):
    rules = dict(re.findall(r"rule (\w+)\n  command = (.*)", extension._ninja_file(cxx, "/cuda/bin/nvcc", ("90",))))
    assert rules["cxx"].startswith(cxx)
    assert rules["cuda"].endswith(f"-o $out{host}")
    assert (
        rules["link"].startswith(f"/cuda/bin/nvcc -shared -cudart static{host} $in") and "-L/cuda/lib" in rules["link"]
    )


@pytest.mark.parametrize(
    ("error", "reason"), [('"driver too old"', "the kernels do not run here: driver too old"), ("nullptr", None)]
)
def test_a_library_that_the_driver_refuses_is_left_alone(cache, monkeypatch, tmp_path, error, reason):
    if (cxx := shutil.which("g++")) is None:
        pytest.skip("no g++")
    library = tmp_path / "compiled-sm_89.so"
    source = f'extern "C" const char* alignprop_fast_cuda_error() {{ return {error}; }}'
    subprocess.run([cxx, "-shared", "-fPIC", "-x", "c++", "-", "-o", library], input=source, text=True, check=True)
    monkeypatch.setattr(extension, "present_arches", lambda: ("89",))
    monkeypatch.setattr(extension, "installed", lambda arches: library)
    assert extension.missing("cuda") == reason


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels are built on Linux only")
def test_two_at_once_build_once(cache, monkeypatch, tmp_path):
    """Threads stand for processes: an open file holds the lock, and each thread has its own."""
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", COMPILER.format(log=tmp_path / "log")))
    library = extension.library_path(())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: extension.build(library, ()), range(2)))
    # bindings.cpp, group_norm_silu_cpu.cpp and the link, each once.
    assert (tmp_path / "log").read_text().count("run") == 3
    assert library.read_text() == "built\n"


def test_another_source_is_another_library(cache, monkeypatch, tmp_path):
    here = extension.library_path(())
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("int a;")
    monkeypatch.setattr(extension, "SOURCES", tmp_path / "csrc")
    assert extension.library_path(()) != here != extension.library_path(("89",))


@pytest.mark.parametrize(
    ("built", "present", "serves"),
    [
        *((("80", "90"), ("86",), True), (("86",), ("80",), False), ((), (), True), ((), ("89",), False)),
        # A GPU newer than all runs the PTX. A major version in between has neither code nor PTX.
        *((("80",), ("80", "90"), True), (("80", "90", "120"), ("130",), True), (("80", "90", "120"), ("100",), False)),
    ],
)
def test_an_installed_library_serves_the_gpus_it_was_built_for(monkeypatch, tmp_path, built, present, serves):
    monkeypatch.setattr(extension, "INSTALLED", tmp_path)
    (tmp_path / extension.library_name(built)).touch()
    assert (extension.installed(present) is not None) == serves
