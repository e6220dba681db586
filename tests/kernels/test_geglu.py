"""The Triton kernels of geglu against the op's reference in float64, and as custom operators.

Tolerance: twice the error of plain PyTorch in the same dtype, plus 1e-6 (design rule for every op).
"""

import pytest
import torch

from alignprop_fast.ops import geglu as ops

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("alignprop_fast.kernels.geglu")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    uv, g = (torch.randn(*shape[:-1], shape[-1] * k, generator=generator) * 2 for k in (2, 1))
    # Values where gelu is nearly flat, and where it is nearly the identity.
    uv.view(-1)[::5] *= 4
    return uv.to(DEVICE, dtype), g.to(DEVICE, dtype)


def plain(uv, g):
    uv = uv.detach().requires_grad_()
    y = ops.geglu_reference(uv)
    return y.detach(), torch.autograd.grad(y, uv, g)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 256), (1, 1), (3, 1, 77), (5, 512), (2, 1024), (2, 1300)])
def test_values_and_gradient(dtype, shape):
    uv, g = inputs(shape, dtype)
    ours = kernels.geglu_forward(uv), kernels.geglu_backward(g, uv)
    exact = plain(uv.double(), g.double())
    for a, b, c in zip(ours, plain(uv, g), exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


def test_strided_inputs_and_two_runs_bit_equal():
    uv, g = inputs((4, 3, 70), torch.float32)
    uv_t, g_t = uv.transpose(0, 1), g.transpose(0, 1)
    assert torch.equal(kernels.geglu_forward(uv_t), kernels.geglu_forward(uv).transpose(0, 1))
    assert torch.equal(kernels.geglu_backward(g_t, uv_t), kernels.geglu_backward(g, uv).transpose(0, 1))


@pytest.mark.parametrize("width", [300, 512])
def test_every_element_is_written_and_none_beyond(width):
    uv, g = inputs((3, width), torch.float32)
    guard = torch.full((3 * width + 600,), float("nan"), device=DEVICE)
    blocks = triton.cdiv(width, 256)
    kernels.geglu_forward_kernel[(3 * blocks,)](uv, guard, width, blocks, BLOCK=256)
    assert not guard[: 3 * width].isnan().any() and guard[3 * width :].isnan().all()
    guard = torch.full((6 * width + 600,), float("nan"), device=DEVICE)
    kernels.geglu_backward_kernel[(3 * blocks,)](g, uv, guard, width, blocks, BLOCK=256)
    assert not guard[: 6 * width].isnan().any() and guard[6 * width :].isnan().all()


def test_custom_operators():
    uv, g = inputs((2, 3, 20), torch.float32)
    torch.library.opcheck(ops._triton_forward.operator, (uv,))
    torch.library.opcheck(ops._triton_backward.operator, (g.transpose(0, 1).contiguous().transpose(0, 1), uv))


def test_configurations():
    assert kernels.config(2560)[0] == 512 and kernels.config(5120)[0] == 1024 and kernels.config(1280)[0] == 256
    assert kernels.config(77)[0] == 256
