"""csrc/group_norm_silu_cuda.cu without a GPU: compiled for the CPU, its thread blocks played by threads.

Tolerance: error against the float64 reference at most twice that of plain PyTorch in the same dtype, plus 1e-6.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from alignprop_fast.ops.extension import SOURCES
from alignprop_fast.ops.group_norm_silu import group_norm_silu_reference

STAND_IN = Path(__file__).parent / "cuda_on_cpu"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The CUDA source with nothing changed but the two things that no C++ compiler can read."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    source = (SOURCES / "group_norm_silu_cuda.cu").read_text()
    source, launches = re.subn(r"(\w+(?:<T, V>)?)<<<(.*)>>>\(p\);", r"launch_on_cpu(\2, [&] { \1(p); });", source)
    source, arrays = re.subn(r"extern __shared__ float shared\[\];", "float* shared = block->shared.data();", source)
    assert launches == 6 and arrays == 2
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    (folder / "kernels.cpp").write_text(source + (STAND_IN / "entry.inc").read_text())
    includes = [f"-I{STAND_IN}", f"-I{SOURCES}"]
    command = [compiler, "-O1", "-std=c++20", "-fPIC", "-shared", "-pthread", "-w", *includes]
    built = subprocess.run(
        [*command, "-o", str(folder / "kernels.so"), str(folder / "kernels.cpp")], capture_output=True, text=True
    )
    if "_Float16" in built.stderr:
        pytest.skip("this compiler has no half precision")
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(folder / "kernels.so"))


def pointer(t):
    return None if t is None else ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize(
    ("dtype", "shape", "groups", "chunks", "silu", "with_time", "centre"),
    [
        (torch.float32, (2, 32, 9, 7), 32, 3, True, True, 1),
        (torch.bfloat16, (1, 320, 3, 5), 32, 2, True, True, 1),  # a vector of 8 channels meets two groups of 10
        (torch.float16, (1, 48, 17, 1), 16, 2, False, True, 1),
        (torch.bfloat16, (1, 6, 9, 8), 3, 2, True, False, 1),  # channels one by one
        (torch.float32, (1, 1280, 1, 2), 1, 2, True, False, 1),  # one row fills the block
        (torch.float32, (1, 64, 9, 5), 16, 40, True, False, 1000),  # more chunks than lanes of a warp
    ],
)
def test_kernels(library, dtype, shape, groups, chunks, silu, with_time, centre):
    generator = torch.Generator().manual_seed(0)
    b, c, h, w = shape
    x, g = (
        (torch.randn(shape, generator=generator) * 2 + m).to(dtype).to(memory_format=torch.channels_last)
        for m in (centre, 0)
    )
    t = torch.randn(b, c, generator=generator).to(dtype) if with_time else None
    gamma, beta = (torch.randn(c, generator=generator).to(dtype) for _ in range(2))
    y, dx = (torch.full_like(x, torch.nan) for _ in range(2))
    mean, rstd, moments = (torch.full((b, groups, n), torch.nan) for n in (1, 1, 2))
    for backward, out in enumerate((y, dx)):
        partial = torch.full((b, groups, chunks, 2), torch.nan)
        pointers = map(pointer, (x, t, gamma, beta, g, out, mean, rstd, partial, moments))
        sizes = map(ctypes.c_int64, (b, h * w, c, groups, chunks))
        failed = library.run(DTYPES[dtype], backward, *pointers, *sizes, ctypes.c_float(1e-5), silu)
        assert not failed

    def values(d):
        inputs = x.to(d).requires_grad_()
        time = None if t is None else t.to(d)
        result = group_norm_silu_reference(inputs, groups, gamma.to(d), beta.to(d), 1e-5, silu, time)
        return result.detach(), torch.autograd.grad(result, inputs, g.to(d))[0]

    for ours, plain, exact in zip((y, dx), values(dtype), values(torch.float64), strict=True):
        assert (ours.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + 1e-6
