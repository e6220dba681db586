"""frozen_conv2d: values and gradients against plain PyTorch; it must not keep its input.

Tolerance: error against the float64 reference at most twice that of plain PyTorch in the same dtype, plus 1e-6.
"""

import pytest
import torch

from alignprop_fast.ops.frozen_conv2d import frozen_conv2d, frozen_conv2d_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Shapes of x and of the weight, then stride, padding, dilation, groups.
GEOMETRIES = [
    ((2, 6, 9, 11), (8, 6, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 6, 10, 7), (8, 6, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    ((1, 6, 8, 8), (4, 6, 3, 3), (2, 2), (0, 0), (1, 1), 1),
    ((1, 6, 12, 5), (4, 3, 1, 3), (3, 1), (0, 1), (1, 2), 2),
    ((2, 5, 4, 4), (7, 5, 1, 1), (1, 1), (0, 0), (1, 1), 1),
]


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(DEVICE)


def value_and_gradient(fn, x, weight, bias, geometry):
    x = x.detach().requires_grad_()
    y = fn(x, weight, bias, *geometry)
    g = randn(*y.shape).to(y)
    return y.detach(), *torch.autograd.grad(y, x, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "dilation", "groups"), GEOMETRIES)
def test_values_and_gradient(dtype, memory_format, shape, kernel, stride, padding, dilation, groups):
    tensors = [
        randn(*shape).to(dtype, memory_format=memory_format),
        randn(*kernel).to(dtype),
        randn(kernel[0]).to(dtype),
    ]
    geometry = (stride, padding, dilation, groups)
    ours = value_and_gradient(frozen_conv2d, *tensors, geometry)
    plain = value_and_gradient(frozen_conv2d_reference, *tensors, geometry)
    # The gradient of y must be the same rounded numbers for all three.
    x, weight, bias = (t.double() for t in tensors)
    x.requires_grad_()
    y = frozen_conv2d_reference(x, weight, bias, *geometry)
    exact = y.detach(), *torch.autograd.grad(y, x, randn(*y.shape).to(dtype).double())
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


def test_gradcheck():
    weight = randn(4, 8, 3, 3)
    x = randn(2, 8, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: frozen_conv2d(t, weight, None, (2, 2), (1, 1)), x)


def test_nothing_of_the_input_is_kept():
    x, weight = randn(2, 16, 8, 8).requires_grad_(), randn(16, 16, 3, 3)
    for fn, expected in (
        (frozen_conv2d, {weight.data_ptr()}),
        (frozen_conv2d_reference, {weight.data_ptr(), x.data_ptr()}),
    ):
        saved = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.add(t.data_ptr()) or t, lambda t: t):
            fn(x, weight, None, (1, 1), (1, 1), (1, 1), 1)
        assert saved == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_compiles_whole(device):
    x, weight, bias = (t.float().to(device) for t in (randn(2, 6, 9, 7), randn(8, 6, 3, 3), randn(8)))
    geometry = ((2, 2), (1, 1), (1, 1), 1)
    compiled = torch.compile(frozen_conv2d, fullgraph=True, backend="aot_eager")
    ours, eager = (value_and_gradient(fn, x, weight, bias, geometry) for fn in (compiled, frozen_conv2d))
    for a, b in zip(ours, eager, strict=True):
        assert a.shape == b.shape and (device == "meta" or torch.allclose(a, b, atol=1e-5))
