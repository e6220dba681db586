"""csrc/group_norm_silu_cuda.cu without a GPU: the same source, compiled for the CPU against cuda_on_cpu/.

Every case runs with blocks and threads forwards, backwards and shuffled, and must give the same bits. Buffers end or
begin at protected pages. Tests with broken kernels show that cuda_on_cpu/ detects faults.

Tolerance: error against the float64 reference at most twice that of plain PyTorch in the same dtype, plus 1e-6.
"""

import ctypes

import pytest
import torch

from alignprop_fast.ops import group_norm_silu as module
from alignprop_fast.ops.extension import SOURCES
from alignprop_fast.ops.group_norm_silu import group_norm_silu_reference

from .cuda_on_cpu.build import STAND_IN, Memory, build, for_cpu_tensors, for_the_cpu

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ORDERS = (0, 1, 2)  # forwards, backwards, shuffled


@pytest.fixture(scope="module")
def library(request):
    kernels = for_the_cpu((SOURCES / "group_norm_silu_cuda.cu").read_text())
    assert kernels.count("cuda_on_cpu::launch(") == 6 and kernels.count("cuda_on_cpu::shared_memory") == 2
    sources = {
        "kernels.cpp": kernels,
        "bindings.cpp": for_cpu_tensors((SOURCES / "bindings.cpp").read_text()),
        "group_norm_silu_cpu.cpp": (SOURCES / "group_norm_silu_cpu.cpp").read_text(),
        "entry.cpp": (STAND_IN / "entry.cpp").read_text(),
    }
    path = build(request.config.cache, "kernels", sources, with_torch=True)
    torch.ops.load_library(str(path))
    loaded = ctypes.CDLL(str(path))
    loaded.run.restype = ctypes.c_char_p
    return loaded


def tensors(dtype, shape, with_time=False, centre=1.0):
    """x [B, H, W, C], t [B, C] or None, gamma and beta [C], and g like x, each from different random numbers."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    b, *_, c = shape
    x, t, gamma, beta, g = randn(*shape) * 2 + centre, randn(b, c), randn(c), randn(c), randn(*shape)
    return [v if v is None else v.to(dtype) for v in (x, t if with_time else None, gamma, beta, g)]


def run(library, inputs, groups, chunks, silu, order, alignment=16):
    """Both passes as bindings.cpp calls them. x and g are [B, H, W, C]; returns y, dx, mean, rstd and moments."""
    library.set_order(order)
    memory = Memory(at_end=order != 1)
    x, t, gamma, beta, g = (v if v is None else memory.place(v, alignment) for v in inputs)
    b, h, w, c = x.shape
    y, dx = (memory.place(torch.full_like(x, torch.nan), alignment) for _ in range(2))
    mean, rstd, moments = (memory.place(torch.full((b, groups, n), torch.nan), 4) for n in (1, 1, 2))
    for backward, out in enumerate((y, dx)):
        partial = memory.place(torch.full((b, groups, chunks, 2), torch.nan))
        tensors = (x, t, gamma, beta, g if backward else None, out, mean, rstd, partial, moments if backward else None)
        pointers = [None if v is None else ctypes.c_void_p(v.data_ptr()) for v in tensors]
        sizes = map(ctypes.c_int64, (b, h * w, c, groups, chunks))
        eps = ctypes.c_float(0 if backward else 1e-5)
        failure = library.run(DTYPES[x.dtype], bool(backward), *pointers, *sizes, eps, silu)
        assert failure is None, failure.decode()
    assert memory.untouched()
    return y, dx, mean, rstd, moments


def values(inputs, groups, silu, dtype):
    """Output and gradient for x by plain PyTorch in `dtype`, as [B, H, W, C]."""
    x, t, gamma, beta, g = (v if v is None else v.to(dtype) for v in inputs)
    x = x.permute(0, 3, 1, 2).requires_grad_()
    y = group_norm_silu_reference(x, groups, gamma, beta, 1e-5, silu, t)
    dx = torch.autograd.grad(y, x, g.permute(0, 3, 1, 2))[0]
    return [v.detach().permute(0, 2, 3, 1) for v in (y, dx)]


def check(library, dtype, shape, groups, chunks, silu=True, with_time=False, centre=1.0, alignment=16):
    inputs = tensors(dtype, shape, with_time, centre)
    runs = [run(library, inputs, groups, chunks, silu, order, alignment) for order in ORDERS]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    assert all(v.isfinite().all() for v in runs[0])
    plain, exact = values(inputs, groups, silu, dtype), values(inputs, groups, silu, torch.float64)
    for ours, theirs, truth in zip(runs[0][:2], plain, exact, strict=True):
        assert (ours.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [128, 256, 320, 512, 640, 960, 1280, 1920, 2560])
def test_widths_of_the_models(library, dtype, channels):
    """Unequal chunks and an incomplete last step, for both kinds of block: resnet (time, SiLU) and attention."""
    rows = max(5, 9000 // channels)
    check(library, dtype, (1, 1, rows, channels), 32, 3, silu=True, with_time=True)
    check(library, dtype, (2, 1, 5, channels), 32, 2, silu=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("silu", "with_time"), [(True, False), (True, True), (False, False), (False, True)])
@pytest.mark.parametrize(
    ("shape", "groups", "chunks"),
    [
        ((2, 9, 7, 32), 32, 3),  # a channel is a group
        ((3, 5, 1, 48), 16, 5),  # a row is a chunk
        ((2, 3, 4, 48), 1, 1),
        ((1, 9, 8, 6), 3, 2),  # channels one by one
        ((2, 1, 1, 33), 3, 1),  # a single row
        ((1, 41, 1, 640), 32, 41),  # more chunks than a warp has lanes
        ((1, 101, 1, 64), 2, 101),
        ((1, 1, 3, 64), 8, 5),  # chunks without a row
        ((1, 1, 200, 8), 4, 2),  # many threads for one channel, of which some have a row less
    ],
)
def test_odd_shapes(library, dtype, silu, with_time, shape, groups, chunks):
    check(library, dtype, shape, groups, chunks, silu, with_time)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_begin_anywhere(library, dtype):
    """Then there are no vectors, and no row may be wider than a block."""
    check(library, dtype, (2, 1, 11, 320), 32, 3, with_time=True, alignment=dtype.itemsize)


@pytest.mark.parametrize("chunks", [1, 40, 323])
@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_a_large_mean_cancels_nothing(library, spread, chunks):
    """Error in fp32 of one deviation of x's own rounding: 1000 * 2^-24 / spread, times 10 for a sum of terms."""
    x, _, gamma, beta, g = tensors(torch.float32, (1, 17, 19, 32), centre=0.0)
    inputs = (x * (spread / 2) + 1000, None, torch.ones_like(gamma), torch.zeros_like(beta), g)
    y, *_ = run(library, inputs, 8, chunks, False, 0)
    assert (y - values(inputs, 8, False, torch.float64)[0]).abs().max() < 10 * 1000 * 2**-24 / spread


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_silu(library, dtype):
    """z is far beyond the overflow of exp, where __fdividef gives 0."""
    x, _, gamma, _, g = tensors(dtype, (1, 3, 5, 32))
    inputs = (x, None, gamma * 100, torch.linspace(-200, 200, 32).to(dtype), g)
    results = run(library, inputs, 8, 2, True, 0)
    for ours, truth in zip(results[:2], values(inputs, 8, True, torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-3)


def test_not_a_number_stays_in_its_group(library):
    inputs = tensors(torch.bfloat16, (1, 2, 3, 8))
    inputs[0][0, 1, 1, 0] = torch.nan
    y, dx, *_ = run(library, inputs, 4, 2, True, 0)
    for v in (y, dx):
        assert v[..., :2].isnan().all() and v[..., 2:].isfinite().all()


def test_what_cannot_be_launched_is_said(library):
    for channels, groups in ((1025, 41), (4100, 41)):
        with pytest.raises(AssertionError, match="too many channels for one row per thread block"):
            run(library, tensors(torch.float32, (1, 1, 1, channels)), groups, 1, True, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_time", [False, True])
def test_op_bindings_and_kernels_together(library, monkeypatch, dtype, with_time):
    """The op as on a GPU, except for the dispatch key of its tensors."""
    monkeypatch.setattr(torch.ops, "alignprop_fast", torch.ops.alignprop_fast_cuda_on_cpu)
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", module.CHUNK_ELEMENTS["cuda"] // 8)
    x, t, gamma, beta, g = tensors(dtype, (2, 5, 7, 320), with_time)
    x, g = x.permute(0, 3, 1, 2), g.permute(0, 3, 1, 2)

    def results(op, d):
        inputs = [v.detach().to(d).requires_grad_() for v in (x, t) if v is not None]
        y = op(inputs[0], inputs[1] if with_time else None, gamma.to(d), beta.to(d))
        return [y.detach(), *torch.autograd.grad(y, inputs, g.to(d))]

    def ours(x, t, gamma, beta):
        return module._CompiledGroupNormSiLU.apply(x, t, (32, gamma, beta, 1e-5, True))

    def reference(x, t, gamma, beta):
        return group_norm_silu_reference(x, 32, gamma, beta, 1e-5, True, t)

    library.set_order(0)
    exact, plain = results(reference, torch.float64), results(reference, dtype)
    for a, b, truth in zip(results(ours, dtype), plain, exact, strict=True):
        assert (a.double() - truth).abs().max() <= 2 * (b.double() - truth).abs().max() + 1e-6
