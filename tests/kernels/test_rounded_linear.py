"""The Triton kernels of rounded_linear against the op's plain expressions."""

import pytest
import torch

from alignprop_fast.ops import rounded_linear as ops

pytest.importorskip("triton")
kernels = pytest.importorskip("alignprop_fast.kernels.rounded_linear")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


@pytest.mark.parametrize("kind", ops.KINDS)
@pytest.mark.parametrize("shape", [(5, 64), (9, 320), (2, 1300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows(kind, shape, dtype):
    x = randn(*shape).to(dtype)
    x[1] = 0
    (q, s), (expected, scale) = kernels.round_rows(x, ops.KINDS[kind]), ops.plain_rows(x, ops.KINDS[kind])
    assert q.dtype == ops.KINDS[kind] and s.shape == scale.shape
    torch.testing.assert_close(s, scale, rtol=1e-6, atol=0)
    # Triton's interpreter rounds 124.7 to 64 in fp8: it loses the carry into the next power of two.
    whole = DEVICE == "cuda" or kind == "int8"
    right = torch.ones_like(x, dtype=torch.bool) if whole else expected.float().frexp().mantissa.abs() != 0.5
    # A GPU divides with an error of 2^-22, which may turn a tie. Then the neighbouring number is as near.
    error, least = (((values.float() * scale - x.float()) * right).norm() for values in (q, expected))
    assert 0 < error <= 1.001 * least and q[1].float().abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [True, False])
def test_sums(dtype, biased):
    sums = torch.arange(-3 * 1100, 3 * 1100, 2, dtype=torch.int32, device=DEVICE).view(3, 1100)
    x_scale, w_scale = randn(3, 1).abs(), randn(1100, 1).abs() / 1000
    bias = randn(1100).to(dtype) if biased else None
    y = kernels.scale_sums(sums, x_scale, w_scale, bias, dtype)
    exact = sums.double() * x_scale.double() * w_scale.double().T + (0 if bias is None else bias.double())
    assert y.dtype == dtype
    # Three roundings to fp32, and one to the dtype.
    assert ((y.double() - exact).abs() <= (torch.finfo(dtype).eps + 3e-7) * exact.abs() + 1e-6).all()


def test_too_wide_is_refused_and_the_op_knows_the_limit():
    assert ops.MAX_TRITON_WIDTH == kernels.MAX_WIDTH and ops.LARGEST == kernels.LARGEST
    with pytest.raises(ValueError, match="at most 16384 channels, not 16385"):
        kernels.config(16385)
