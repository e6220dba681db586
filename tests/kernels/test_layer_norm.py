"""The Triton kernels of layer_norm against the op's reference in float64, and as custom operators.

Tolerance: twice the error of plain PyTorch in the same dtype, plus 1e-6 (design rule for every op).
"""

import pytest
import torch

from alignprop_fast.ops import layer_norm as ops

pytest.importorskip("triton")
kernels = pytest.importorskip("alignprop_fast.kernels.layer_norm")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
# Whether there is a scale, and a shift.
AFFINE = [(True, True), (True, False), (False, True), (False, False)]


def inputs(shape, dtype, affine=(True, True)):
    """x, residual, gradients of both outputs, gamma, beta. affine: whether there is a gamma, and a beta."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, r, g, h = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(4))
    gamma, beta = (torch.randn(shape[-1], generator=generator).to(DEVICE, dtype) for _ in range(2))
    return x * 2 + 3, r, g, h, gamma if affine[0] else None, beta if affine[1] else None


def plain(x, r, g, h, gamma, beta):
    """(y, dx), or with a residual (y, s, dx)."""
    x = x.detach().requires_grad_()
    s = x if r is None else x + r
    y = ops.layer_norm_reference(s, gamma, beta, EPS)
    if r is None:
        return y.detach(), torch.autograd.grad(y, x, g)[0]
    return y.detach(), s.detach(), torch.autograd.grad([y, s], x, [g, h])[0]


def fused(x, r, g, h, gamma, beta):
    y, s, mean, rstd = kernels.layer_norm_forward(x, r, gamma, beta, EPS)
    if r is None:
        return y, kernels.layer_norm_backward(g, None, x, gamma, mean, rstd)
    return y, s, kernels.layer_norm_backward(g, h, s, gamma, mean, rstd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "affine"),
    [
        *(((3, 5, 59), affine) for affine in AFFINE),
        *(((2, 9, 320), AFFINE[0]), ((17, 64), AFFINE[3]), ((1, 2), AFFINE[0])),
        *(((2, 1280), AFFINE[1]), ((1, 4100), AFFINE[2])),
    ],
)
def test_values_and_gradient(dtype, residual, shape, affine):
    x, r, *others = inputs(shape, dtype, affine)
    tensors = [x, r if residual else None, *others]
    exact = plain(*(None if t is None else t.double() for t in tensors))
    for a, b, c in zip(fused(*tensors), plain(*tensors), exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


def test_constant_rows_are_finite():
    x = torch.full((3, 40), 7.0, device=DEVICE)
    y, _, mean, rstd = kernels.layer_norm_forward(x, None, None, None, EPS)
    assert y.abs().max() == 0 and torch.equal(mean, x[:, 0])
    assert torch.allclose(rstd, torch.tensor(EPS, device=DEVICE) ** -0.5)


def test_strided_inputs_and_two_runs_bit_equal():
    x, r, g, h, gamma, beta = inputs((4, 3, 70), torch.float32)
    one = fused(x, r, g, h, gamma, beta)
    apart = (torch.stack([t, t], -1)[:, 0] for t in (gamma, beta))
    two = fused(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, r, g, h)), *apart)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_every_element_is_written_and_none_beyond():
    x, r, g, h, gamma, beta = inputs((5, 70), torch.float32)
    y, s, dx = (torch.full((5 * 70 + 300,), float("nan"), device=DEVICE) for _ in range(3))
    mean, rstd = (torch.full((5 + 8,), float("nan"), device=DEVICE) for _ in range(2))
    shape = {"RESIDUAL": True, "SCALE": True, "ROWS": 4, "BLOCK_C": 128}
    kernels.layer_norm_forward_kernel[(2,)](x, r, gamma, beta, s, y, mean, rstd, 5, 70, EPS, SHIFT=True, **shape)
    kernels.layer_norm_backward_kernel[(2,)](g, h, s, gamma, mean, rstd, dx, 5, 70, **shape)
    for t, size in ((y, 350), (s, 350), (dx, 350), (mean, 5), (rstd, 5)):
        assert not t[:size].isnan().any() and t[size:].isnan().all()


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("residual", [True, False])
def test_custom_operators(affine, residual):
    x, r, g, h, gamma, beta = inputs((2, 3, 20), torch.float32, affine)
    r, h = (r, h) if residual else (None, None)
    torch.library.opcheck(ops._triton_forward.operator, (x, r, gamma, beta, EPS))
    _, _, mean, rstd = kernels.layer_norm_forward(x, r, gamma, beta, EPS)
    strided = g.transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(ops._triton_backward.operator, (strided, h, x, gamma, mean, rstd))


def test_too_wide_is_refused_and_the_op_knows_the_limit():
    assert ops.MAX_TRITON_WIDTH == kernels.MAX_WIDTH
    with pytest.raises(ValueError, match="at most 8192 channels, not 8193"):
        kernels.config(8193)
