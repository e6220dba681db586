"""group_norm_silu with csrc/ and with PyTorch's kernels: values, gradients, kept tensors, and tracing by compilers.

Tolerance: error against the float64 reference at most twice that of plain PyTorch in the same dtype, plus 1e-6.
"""

import pytest
import torch

from alignprop_fast.ops import autotune
from alignprop_fast.ops import group_norm_silu as module
from alignprop_fast.ops.group_norm_silu import backend, group_norm_silu, group_norm_silu_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if DEVICE == "cuda" else [])]
SHAPES = [
    ((2, 32, 17, 19), 32),
    ((1, 320, 1, 7), 32),
    ((3, 48, 5, 1), 16),
    ((2, 48, 3, 4), 1),
    ((2, 6, 9, 8), 3),  # no multiple of a vector
    ((1, 320, 34, 35), 32),  # several chunks of rows
]


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def values(fn, x, t, g):
    """Output and gradients for x and, if there is one, the time embedding."""
    inputs = [v.detach().requires_grad_() for v in (x, t) if v is not None]
    y = fn(*inputs)
    return [y, *torch.autograd.grad(y, inputs, g.to(y))]


def check(x, g, groups, dtype, silu=True, t=None):
    """x, g, t: float64. Compares in dtype; returns the op's results."""
    # Every version starts from the same rounded numbers.
    x, g, t = (v if v is None else v.to(dtype).double() for v in (x, g, t))
    gamma, beta = (randn(x.shape[1], seed=s).to(dtype).double() for s in (1, 2))

    def run(op, d, **options):
        def fn(x, t=None):
            return op(x, groups, gamma.to(d), beta.to(d), 1e-5, silu=silu, addend_BC=t)

        return values(fn, x.to(d), None if t is None else t.to(d), g)

    ours, plain = run(group_norm_silu, dtype), run(group_norm_silu_reference, dtype)
    for a, b, exact in zip(ours, plain, run(group_norm_silu_reference, torch.float64), strict=True):
        assert a.dtype == dtype
        assert (a.double() - exact).abs().max() <= 2 * (b.double() - exact).abs().max() + 1e-6
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("silu", "with_time"), [(True, False), (True, True), (False, False), (False, True)])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_compiled(compiled_kernels, dtype, silu, with_time, shape, groups):
    x = randn(*shape).to(memory_format=torch.channels_last) * 3 + 1
    if min(shape[2:]) > 1 or shape[1] > 1:
        assert backend(x.to(dtype)) == "csrc"
    y, dx, *_ = check(x, randn(*shape, seed=3), groups, dtype, silu, randn(*shape[:2]) if with_time else None)
    assert y.is_contiguous(memory_format=torch.channels_last) and dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_time", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_aten(monkeypatch, dtype, with_time, memory_format, shape, groups):
    monkeypatch.setattr(module, "_extension_missing", lambda device_type: "left out")
    monkeypatch.setattr(autotune, "_choices", {})
    x = randn(*shape).to(memory_format=memory_format) * 3 + 1
    assert backend(x.to(dtype)).startswith("aten: ")
    check(x, randn(*shape, seed=3), groups, dtype, True, randn(*shape[:2]) if with_time else None)
    check(x, randn(*shape, seed=3), groups, dtype, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_addend_for_all_images(compiled_kernels, dtype, memory_format):
    x = randn(2, 32, 5, 3).to(memory_format=memory_format)
    *_, dt = check(x, randn(2, 32, 5, 3, seed=3), 8, dtype, t=randn(1, 32))
    assert dt.shape == (1, 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(compiled_kernels, dtype):
    wide = randn(2, 64, 9, 11).to(memory_format=torch.channels_last)
    for x in (wide[:, :, ::2], wide[:, 3:35], wide[1:, :, :, 1:]):
        y, *_ = check(x, randn(*x.shape, seed=3)[:, :, :, :], x.shape[1] // 4, dtype)
        assert y.is_contiguous(memory_format=torch.channels_last)
    # A gradient in another format than x.
    check(wide, randn(64, 2, 9, 11).transpose(0, 1), 16, dtype)


@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_a_large_mean_cancels_nothing(compiled_kernels, spread):
    """Error in fp32 of one deviation of x's own rounding: 1000 * 2^-24 / spread, times 10 for a sum of terms."""
    x = (randn(2, 32, 17, 19) * spread + 1000).float().to(memory_format=torch.channels_last)
    ones, zeros = torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE)
    y = group_norm_silu(x, 8, ones, zeros, 1e-12, silu=False)
    exact = group_norm_silu_reference(x.double(), 8, ones.double(), zeros.double(), 1e-12, silu=False)
    assert (y - exact).abs().max() < 10 * 1000 * 2**-24 / spread


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_written_and_reruns_are_bit_equal(compiled_kernels, dtype):
    x = randn(2, 320, 17, 19).to(dtype).to(memory_format=torch.channels_last)
    gamma = randn(320).to(dtype)
    runs = []
    for _ in range(2):
        y, dx = (torch.full_like(x, torch.nan) for _ in range(2))
        statistics, moments = (torch.full((2, 2, 32), torch.nan, device=DEVICE) for _ in range(2))
        partial = module._partial(x, 32).fill_(torch.nan)
        torch.ops.alignprop_fast.group_norm_silu_forward(x, None, gamma, gamma, 1e-5, True, y, statistics, partial)
        partial.fill_(torch.nan)
        torch.ops.alignprop_fast.group_norm_silu_backward(
            x, x, None, gamma, gamma, statistics, True, dx, partial, moments
        )
        runs.append((y, statistics, dx, moments))
    assert all(torch.isfinite(v).all() for v in runs[0])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_not_a_number_stays_one(compiled_kernels):
    x = randn(1, 8, 3, 3).float().to(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = torch.nan
    ones = torch.ones(8, device=DEVICE)
    y = group_norm_silu(x, 4, ones, ones)
    assert y[0, :2].isnan().all() and not y[0, 2:].isnan().any()


def test_saturated_silu(compiled_kernels):
    """For large |z| silu is 0 or z and its gradient is finite: exp must not overflow or lose range."""
    x = randn(1, 8, 3, 3).float().to(memory_format=torch.channels_last)
    gamma, beta = torch.ones(8, device=DEVICE), torch.tensor([-200.0, -90, -87, -30, 30, 88, 90, 200], device=DEVICE)
    inputs = x.requires_grad_()
    y = group_norm_silu(inputs, 4, gamma, beta)
    exact = group_norm_silu_reference(x.double(), 4, gamma.double(), beta.double(), 1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-30)
    assert torch.autograd.grad(y.sum(), inputs)[0].isfinite().all()


@pytest.mark.parametrize("with_time", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_gradcheck(silu, with_time):
    gamma, beta = randn(8), randn(8, seed=1)
    inputs = [randn(2, 8, 4, 4).requires_grad_(), *([randn(2, 8).requires_grad_()] if with_time else [])]
    assert torch.autograd.gradcheck(
        lambda x, t=None: group_norm_silu(x, 4, gamma, beta, silu=silu, addend_BC=t), inputs
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_what_is_kept(compiled_kernels, memory_format):
    """x itself, the time embedding, and mean and deviation of 4 groups of 2 images in fp32."""
    x = randn(2, 16, 8, 8).float().to(memory_format=memory_format).requires_grad_()
    t, gamma = randn(2, 16).float(), torch.nn.Parameter(randn(16).float())
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.update({v.data_ptr(): v}) or v, lambda v: v):
        y = group_norm_silu(x, 4, gamma, gamma, addend_BC=t)
    for v in (x, t):
        kept.pop(v.data_ptr())
    assert {v.dtype for v in kept.values()} == {torch.float32}
    assert sum(v.numel() for v in kept.values()) == 2 * 2 * 4
    y.sum().backward()
    assert x.grad is not None and gamma.grad is None


def test_opcheck(compiled_kernels):
    x = randn(2, 32, 5, 3).float().to(memory_format=torch.channels_last)
    t, gamma, statistics = randn(2, 32).float(), randn(32).float(), randn(2, 2, 8).float().abs() + 1
    partial, moments, out = module._partial(x, 8), torch.empty_like(statistics), torch.empty_like(x)
    ops = torch.ops.alignprop_fast
    torch.library.opcheck(
        ops.group_norm_silu_forward.default, (x, t, gamma, gamma, 1e-5, True, out, statistics.clone(), partial)
    )
    torch.library.opcheck(
        ops.group_norm_silu_backward.default, (x, x, t, gamma, gamma, statistics, True, out, partial, moments)
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_under_torch_compile(compiled_kernels, memory_format):
    x, t = randn(2, 32, 5, 3).float().to(memory_format=memory_format), randn(2, 32).float()
    gamma, beta = randn(32).float(), randn(32, seed=1).float()

    def fn(x, t):
        return group_norm_silu(x, 8, gamma, beta, addend_BC=t) * 2

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(values(compiled, x, t, x), values(fn, x, t, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert a.stride() == b.stride()


def test_on_meta_tensors():
    x = torch.empty(2, 32, 5, 3, device="meta").to(memory_format=torch.channels_last).requires_grad_()
    y = group_norm_silu(x, 8, torch.empty(32, device="meta"), torch.empty(32, device="meta"))
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape and backend(x) == "aten: no kernel for torch.float32 on meta"


def test_backend_says_why(compiled_kernels):
    x = randn(2, 32, 5, 3).float()
    assert backend(x) == "aten: x is not channels_last"
    x = x.to(memory_format=torch.channels_last)
    assert backend(x) == "csrc"
    assert backend(x.double()) == f"aten: no kernel for torch.float64 on {DEVICE}"
