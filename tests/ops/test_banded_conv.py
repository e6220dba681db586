"""norm_conv, upsample_conv and banded_residual: bands of rows give the whole image's results and keep less.

Tolerance: error against the float64 reference at most twice that of plain PyTorch in the same dtype, plus 1e-6; in
float64 1e-10 of the largest element.
"""

import pytest
import torch

from alignprop_fast.ops import banded_conv, banded_residual
from alignprop_fast.ops.banded_conv import (
    NormConv,
    norm_conv,
    norm_conv_reference,
    upsample_conv,
    upsample_conv_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [torch.contiguous_format, torch.channels_last]
OPS = {
    "norm_conv": (norm_conv, norm_conv_reference),
    "upsample_conv": (upsample_conv, upsample_conv_reference),
    "residual": (banded_residual.banded_residual, banded_residual.banded_residual_reference),
    "residual_shortcut": (banded_residual.banded_residual, banded_residual.banded_residual_reference),
}


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def layer(c, o, seed=0):
    weight = randn(o, c, 3, 3, seed=seed) / (3 * c**0.5)
    return NormConv(4, randn(c, seed=seed), randn(c, seed=seed + 1), 1e-6, weight, randn(o, seed=seed))


def arguments(name, c):
    """The op's inputs beside x, which has c channels, in float64."""
    if name == "norm_conv":
        return (layer(c, 5),)
    if name == "upsample_conv":
        return randn(6, c, 3, 3), randn(6)
    if name == "residual":
        return layer(c, c), layer(c, c, seed=1), None
    return layer(c, 12), layer(12, 12, seed=1), (randn(12, c, 1, 1), randn(12))


def cast(value, dtype):
    """Tensors in (nested) tuples in another dtype."""
    if isinstance(value, NormConv):
        return NormConv(*(cast(v, dtype) for v in value))
    if isinstance(value, tuple):
        return tuple(cast(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def value_and_gradient(fn, x, g, *rest):
    x = x.detach().requires_grad_()
    y = fn(x, *rest)
    return y.detach(), torch.autograd.grad(y, x, g.to(y.dtype))[0]


def check(name, x, dtype, *rows):
    """x: float64. Compares in dtype with plain PyTorch and with float64; returns the op's results."""
    op, reference = OPS[name]
    # Every version starts from the same rounded numbers.
    x, others = (cast(v, dtype) for v in (x, arguments(name, x.shape[1])))
    wide = (x.double(), cast(others, torch.float64))
    g = randn(*reference(wide[0], *wide[1]).shape).to(dtype)
    ours = value_and_gradient(op, x, g, *others, *rows)
    plain = value_and_gradient(reference, x, g, *others)
    exact = value_and_gradient(reference, wide[0], g, *wide[1])
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        limit = 1e-10 * c.abs().max() if dtype == torch.float64 else 2 * (b.double() - c).abs().max() + 1e-6
        assert (a.double() - c).abs().max() <= limit
    return ours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("height", "rows"), [(17, 4), (17, 1), (16, 4), (5, 64), (1, 1), (40, None)])
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradient(name, height, rows, memory_format, dtype):
    x = (randn(2, 8, height, 7) * 2 + 1).contiguous(memory_format=memory_format)
    y, dx = check(name, x, dtype, rows)
    if height > 1:
        assert y.is_contiguous(memory_format=memory_format) and dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", OPS)
def test_strided(name):
    wide = randn(2, 20, 9, 11)
    for x in (wide[:, 3:11], wide[:, ::2, :, 1:][:, :8], wide[:, :8].transpose(2, 3)):
        check(name, x, torch.float32, 4)


@pytest.mark.parametrize("name", OPS)
def test_gradient_that_is_one_number_everywhere(name):
    """The gradient of a sum has strides of zero."""
    op, reference = OPS[name]
    others, x = arguments(name, 8), randn(1, 8, 7, 5)
    ours, exact = (value_and_gradient(lambda *v, f=f: f(*v).sum(), x, x.sum(), *others) for f in (op, reference))
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name, rows):
    op, others = OPS[name][0], arguments(name, 8)
    assert torch.autograd.gradcheck(lambda x: op(x, *others, rows), randn(1, 8, 3, 3).requires_grad_())


@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_a_large_mean_cancels_nothing(spread):
    """Error in fp32 of one deviation of x's own rounding, 1000 * 2^-24 / spread, times 10 for a sum of terms."""
    x = (randn(1, 8, 33, 19) * spread + 1000).float()
    identity = torch.zeros(8, 8, 3, 3, device=DEVICE)
    identity[range(8), range(8), 1, 1] = 1
    one = NormConv(2, torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE), 1e-12, identity, None)
    exact = norm_conv_reference(x.double(), cast(one, torch.float64))
    assert (norm_conv(x, one, 4) - exact).abs().max() < 10 * 1000 * 2**-24 / spread


@pytest.mark.parametrize("name", OPS)
def test_every_element_is_written_and_reruns_are_bit_equal(monkeypatch, name):
    empty, op = banded_conv._empty, OPS[name][0]
    monkeypatch.setattr(banded_conv, "_empty", lambda *a: empty(*a).fill_(torch.nan))
    x, others = randn(2, 8, 11, 7).float(), cast(arguments(name, 8), torch.float32)
    before = x.clone()
    runs = [value_and_gradient(lambda *v: op(*v).square().sum(), x, x.new_ones(()), *others) for _ in range(2)]
    assert all(v.isfinite().all() for v in runs[0])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", OPS)
def test_the_gradient_that_arrives_is_left_as_it_was(name):
    op, others = OPS[name][0], cast(arguments(name, 8), torch.float32)
    x = randn(2, 8, 11, 7).float().requires_grad_()
    y = op(x, *others)
    g = torch.randn_like(y)
    before = g.clone()
    y.backward(g)
    assert torch.equal(g, before)


@pytest.mark.parametrize(("name", "numbers"), [("norm_conv", 2), ("upsample_conv", 0), ("residual_shortcut", 4)])
def test_what_is_kept(name, numbers):
    """Kept bytes: x if anything is kept, and the given fp32 numbers per channel; weights do not count."""
    op, others = OPS[name][0], cast(arguments(name, 8), torch.float32)
    x = randn(2, 8, 9, 7).float().requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.update({v.data_ptr(): v}) or v, lambda v: v):
        op(x, *others)
    weights = {v.data_ptr() for v in others if isinstance(v, torch.Tensor)}
    assert (x.data_ptr() in kept) == (numbers > 0)
    rest = [v for address, v in kept.items() if address not in {x.data_ptr(), *weights}]
    assert len(rest) == numbers
    assert all(v.shape[0] == 2 and v.shape[2:] == (1, 1) and v.dtype == torch.float32 for v in rest)


@pytest.mark.parametrize("name", OPS)
def test_bytes_can_be_counted_without_data(name):
    op, others = OPS[name][0], cast(arguments(name, 8), torch.bfloat16)
    others = tuple(NormConv(*map(to_meta, v)) if isinstance(v, NormConv) else to_meta(v) for v in others)
    x = torch.empty(2, 8, 40, 7, dtype=torch.bfloat16, device="meta")
    y, dx = value_and_gradient(op, x, torch.empty((), device="meta").expand(op(x, *others).shape), *others)
    assert y.dtype == dx.dtype == torch.bfloat16 and dx.shape == x.shape


def to_meta(value):
    if isinstance(value, tuple):
        return tuple(map(to_meta, value))
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("rows", [0, -4])
def test_bands_of_no_rows(rows):
    with pytest.raises(ValueError, match="use 1 or more"):
        norm_conv(randn(1, 8, 4, 4), layer(8, 8), rows)
