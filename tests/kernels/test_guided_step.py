"""The Triton kernels of guided_step against the op's reference in float64.

Tolerance: twice the error of plain PyTorch in the same dtype, plus 1e-6 (design rule for every op).
"""

import pytest
import torch

from alignprop_fast.ops import guided_step as ops
from alignprop_fast.ops.guided_step import guided_step_adjoint_reference, guided_step_reference

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("alignprop_fast.kernels.guided_step")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def within(ours, plain, exact):
    allowed = 2 * (plain.double() - exact).abs().max() + 1e-6
    assert (ours.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 4, 17, 19), (3, 1, 1, 1)])
@pytest.mark.parametrize("weights", [(0.7,), (-4.0, 5.0)])
@pytest.mark.parametrize("noisy", [False, True])
def test_forward(dtype, shape, weights, noisy):
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2))
    y = torch.randn(len(weights) * shape[0], *shape[1:], generator=generator).to(DEVICE, dtype)
    z = z.to(dtype) if noisy else None
    ours = kernels.guided_step(x, y, z, 1.01, weights, 0.3)
    exact = guided_step_reference(x.double(), y.double(), None if z is None else z.double(), 1.01, weights, 0.3)
    within(ours, guided_step_reference(x, y, z, 1.01, weights, 0.3), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(0.7,), (-4.0, 5.0)])
def test_adjoint(dtype, weights):
    g = torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours = kernels.guided_step_adjoint(g, 0.9, weights, dtype)
    plain = guided_step_adjoint_reference(g, 0.9, weights, dtype)
    exact = guided_step_adjoint_reference(g.double(), 0.9, weights, torch.float64)
    assert ours[1].dtype == dtype
    for a, b, c in zip(ours, plain, exact, strict=True):
        within(a, b, c)


@pytest.mark.parametrize("noisy", [False, True])
def test_custom_operators(noisy):
    x, y = torch.randn(2, 4, 3, 5, device=DEVICE), torch.randn(4, 4, 3, 5, device=DEVICE, dtype=torch.float16)
    torch.library.opcheck(ops._triton_forward.operator, (x, y, x.flip(0) if noisy else None, 0.9, [-4.0, 5.0], 0.3))
    channels_last = x.to(memory_format=torch.channels_last)
    torch.library.opcheck(ops._triton_adjoint.operator, (channels_last, 0.9, [-4.0, 5.0], torch.float16))
