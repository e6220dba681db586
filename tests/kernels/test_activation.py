"""The Triton kernels of activations against the ops' references in float64, and as custom operators.

Tolerance: twice the error of plain PyTorch in the same dtype, plus 1e-6 (design rule for every op).
"""

import pytest
import torch

from alignprop_fast.ops import activation as ops

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("alignprop_fast.kernels.activation")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = [("gelu", 2, False), ("silu", 2, False), ("silu", 1, False), ("silu", 2, True), ("gelu_tanh", 1, True)]


def inputs(shape, dtype, parts=2, apart=False, beside=False):
    """(x, u, beside, g): x holds `parts` of D channels; u apart from it, or None."""
    generator = torch.Generator().manual_seed(sum(shape))
    widths = [parts * shape[-1], shape[-1], 5, shape[-1] + (5 if beside else 0)]
    x, u, left, g = (torch.randn(*shape[:-1], width, generator=generator) * 2 for width in widths)
    # Values where the function is nearly flat, and where it is nearly the identity.
    x.view(-1)[::5] *= 4
    given = (x, u if apart else None, left if beside else None, g)
    return [None if t is None else t.to(DEVICE, dtype) for t in given]


def plain(x, u, beside, g, function):
    learning = [t.detach().requires_grad_() for t in (x, u) if t is not None]
    y = ops._plain_forward(learning[0], learning[1] if u is not None else None, beside, function)
    return y.detach(), *torch.autograd.grad(y, learning, g)


def fused(x, u, beside, g, function):
    y = ops._launch_forward(x, u, beside, function)
    dx, du = ops._launch_backward(own(g, beside), x, u, function)
    return (y, dx) if u is None else (y, dx, du)


def own(g, beside):
    return g if beside is None else g[..., beside.shape[-1] :]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 256), (3, 1, 77), (2, 1300)])
@pytest.mark.parametrize(("function", "parts", "beside"), OPS)
def test_values_and_gradients(dtype, shape, function, parts, beside):
    tensors = inputs(shape, dtype, parts, function == "silu" and parts == 1, beside)
    exact = plain(*(None if t is None else t.double() for t in tensors), function)
    for a, b, c in zip(fused(*tensors, function), plain(*tensors, function), exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


@pytest.mark.parametrize(("function", "parts", "beside"), OPS)
def test_strided_inputs_and_two_runs_bit_equal(function, parts, beside):
    tensors = inputs((4, 3, 70), torch.float32, parts, function == "silu" and parts == 1, beside)
    one = fused(*tensors, function)
    two = fused(*(None if t is None else t.transpose(0, 1) for t in tensors), function)
    assert all(torch.equal(a, b.transpose(0, 1)) for a, b in zip(one, two, strict=True))
    # Parts of a larger matrix, whose rows lie further apart, are read where they lie.
    larger = [None if t is None else torch.cat([t, t], dim=-1)[..., : t.shape[-1]] for t in tensors]
    assert all(torch.equal(a, b) for a, b in zip(one, fused(*larger, function), strict=True))


@pytest.mark.parametrize("width", [300, 512])
def test_every_element_is_written_and_none_beyond(width):
    (uv, _, beside, g), function = inputs((3, width), torch.float32, beside=True), "gelu"
    v, u = ops._parts(uv, None, function)
    guard = torch.full((3 * (width + 5) + 600,), float("nan"), device=DEVICE)
    blocks, shape = triton.cdiv(width, 256), {"FUNCTION": function, "GATED": True, "BLOCK": 256}
    kernels.activation_forward_kernel[(3 * (blocks + 1),)](
        v, u, beside, guard, width, 5, 2 * width, 2 * width, 5, blocks + 1, BESIDE=True, **shape
    )
    assert not guard[: 3 * (width + 5)].isnan().any() and guard[3 * (width + 5) :].isnan().all()
    guard = torch.full((6 * width + 600,), float("nan"), device=DEVICE)
    kernels.activation_backward_kernel[(3 * blocks,)](
        g, v, u, guard[width:], guard, width, width + 5, *[2 * width] * 4, blocks, **shape
    )
    assert not guard[: 6 * width].isnan().any() and guard[6 * width :].isnan().all()


@pytest.mark.parametrize(("function", "parts", "beside"), OPS)
def test_custom_operators(function, parts, beside):
    x, u, left, g = inputs((2, 3, 20), torch.float32, parts, function == "silu" and parts == 1, beside)
    torch.library.opcheck(ops._triton_forward.operator, (x, u, left, function))
    strided = own(g, left).transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(ops._triton_backward.operator, (strided, x, u, function))


def test_configurations():
    assert kernels.config(2560)[0] == 512 and kernels.config(5120)[0] == 1024 and kernels.config(1280)[0] == 256
    assert kernels.config(77)[0] == 256
