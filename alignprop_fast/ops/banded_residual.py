"""banded_residual: a frozen residual block by bands of rows, with memory for input, output and a few bands.

    h = conv1(silu(norm1(x)))        y = conv2(silu(norm2(h))) + shortcut(x)

The shortcut is x itself or a 1x1 convolution. As one op it keeps x and four numbers per channel. Each direction makes
one tensor of full size, beside the incoming gradient. Forward, y is written over h, band by band. Backward, h is
computed again, its gradient dh is written over it, and dx over dh if they have one size. The forward pass runs 2
convolutions. The backward pass runs conv1 again, conv2's transpose twice (dh overwrites the memory that would keep its
result) and conv1's transpose once, as many as for a checkpointed block. For the bands see banded_conv.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alignprop_fast.ops import switched_off
from alignprop_fast.ops.banded_conv import (
    Normaliser,
    NormConv,
    band_rows,
    conv_band,
    empty_like_rows,
    halo_bands,
    norm_conv_backward,
    norm_conv_reference,
    statistics,
)

Shortcut = tuple[torch.Tensor, torch.Tensor | None] | None
"""Weight [O, C, 1, 1] and bias [O] of a 1x1 convolution, or None: x itself."""


def banded_residual_reference(x: torch.Tensor, first: NormConv, second: NormConv, shortcut: Shortcut) -> torch.Tensor:
    """Plain PyTorch, the whole image at once. x: [B, C, H, W]."""
    h = norm_conv_reference(x, first)
    return norm_conv_reference(h, second) + (x if shortcut is None else F.conv2d(x, *shortcut))


def _first(x: torch.Tensor, norm: Normaliser, layer: NormConv, rows: int) -> torch.Tensor:
    h = empty_like_rows(x, layer.weight.shape[0])
    for span, band in halo_bands(x, rows, norm.activated):
        h[:, :, span] = conv_band(band, layer.weight, layer.bias)
        del band
    return h


class _BandedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, first: NormConv, second: NormConv, shortcut: Shortcut, rows: int
    ) -> torch.Tensor:
        statistics_x = statistics(x, first, rows)
        y = h = _first(x, Normaliser(first, *statistics_x), first, rows)
        statistics_h = statistics(h, second, rows)
        ctx.save_for_backward(x, *statistics_x, *statistics_h)
        # The layers are frozen, so autograd need not see their tensors.
        ctx.layers, ctx.rows = (first, second, shortcut), rows
        for span, band in halo_bands(h, rows, Normaliser(second, *statistics_h).activated):
            band = conv_band(band, second.weight, second.bias)
            y[:, :, span] = band.add_(x[:, :, span] if shortcut is None else F.conv2d(x[:, :, span], *shortcut))
            del band
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *moments = ctx.saved_tensors
        first, second, shortcut = ctx.layers
        norm1, norm2 = Normaliser(first, *moments[:2]), Normaliser(second, *moments[2:])
        h = _first(x, norm1, first, ctx.rows)
        dh = norm_conv_backward(g, h, norm2, second.weight, ctx.rows, dx=h)
        back = None if shortcut is None else shortcut[0].transpose(0, 1)

        def through_shortcut(span: slice) -> torch.Tensor:
            return g[:, :, span] if back is None else F.conv2d(g[:, :, span], back)

        dx = dh if dh.shape == x.shape else empty_like_rows(x, x.shape[1])
        norm_conv_backward(dh, x, norm1, first.weight, ctx.rows, dx, through_shortcut)
        return dx, None, None, None, None


def banded_residual(
    x: torch.Tensor, first: NormConv, second: NormConv, shortcut: Shortcut = None, rows: int | None = None
) -> torch.Tensor:
    """The residual block by bands of rows, differentiable only in x; keeps x, means and deviations.

    Args:
        x: [B, C, H, W], contiguous or channels_last, as the result will be.
        first, second: C to O and O to O channels, frozen, of x's dtype.
        shortcut: required if C and O differ; frozen.
        rows: height of a band; None: 1/32 of the height, at least 16.

    Returns:
        [B, O, H, W].
    """
    if switched_off.reason("banded_residual") is not None:
        return banded_residual_reference(x, first, second, shortcut)
    return _BandedResidual.apply(x, first, second, shortcut, band_rows(rows, x.shape[2]))
