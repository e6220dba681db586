"""by_bands: values and gradients of the whole image, whatever the bands, and only the input is kept.

Tolerance: float64 rounding, 1e-10 of the largest element.
"""

import pytest
import torch
import torch.nn.functional as F

from alignprop_fast.ops.local_bands import by_bands

WEIGHTS = torch.randn(2, 3, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def two_convolutions(x):
    return F.conv2d(F.silu(F.conv2d(x, WEIGHTS[0], padding=1)), WEIGHTS[1], padding=1) + x


def upsampled(x):
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"), WEIGHTS[0], padding=1)


def value_and_gradient(f, x):
    x = x.detach().requires_grad_()
    y = f(x)
    ramp = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return y.detach(), torch.autograd.grad((y * ramp).sum(), x)[0]


@pytest.mark.parametrize("rows", [1, 4, None])
@pytest.mark.parametrize(("f", "halo", "scale"), [(two_convolutions, 2, 1), (upsampled, 1, 2)])
def test_values_and_gradients_are_those_of_the_whole_image(f, halo, scale, rows):
    x = torch.randn(2, 3, 11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = value_and_gradient(f, x)
    for a, b in zip(value_and_gradient(lambda x: by_bands(f, x, halo, scale, rows), x), whole, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def test_a_band_sees_its_rows_and_the_halo_alone():
    heights = []

    def f(x):
        heights.append(x.shape[-2])
        return two_convolutions(x)

    by_bands(f, torch.zeros(1, 3, 12, 5, dtype=torch.float64), 2, rows=4)
    assert heights == [6, 8, 6]


def test_it_keeps_its_input_alone():
    x = torch.randn(1, 3, 12, 5, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        by_bands(two_convolutions, x, 2, rows=4)
    assert kept == [x.data_ptr()]
