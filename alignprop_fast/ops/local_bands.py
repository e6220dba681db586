"""by_bands: a function of an image, each of whose rows depends on a few rows around it, computed by bands of rows.

    y = f(x), where rows s i .. s (i + 1) of y depend on rows i - halo .. i + halo of x, for a scale s

A band takes `halo` more rows on either side, and the rows of its result that saw a cut are left out. At the image's own
border nothing is cut, so padding is f's own. The backward pass computes each band again, so this keeps only x.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from alignprop_fast.ops.banded_conv import band_rows, spans

Image = Callable[[torch.Tensor], torch.Tensor]


def by_bands(f: Image, x: torch.Tensor, halo: int, scale: int = 1, rows: int | None = None) -> torch.Tensor:
    """f(x) by bands of rows, differentiable only in x; keeps x.

    Args:
        f: from [..., H, W] to [..., scale H, W'], with frozen weights.
        x: [..., H, W].
        halo: rows of x on either side on which a row of the result depends.
        rows: height of a band of x; None: 1/32 of the height, at least 16.
    """
    return _ByBands.apply(x, f, halo, scale, band_rows(rows, x.shape[-2]))


class _ByBands(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, f: Image, halo: int, scale: int, rows: int) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.f, ctx.halo, ctx.scale, ctx.rows = f, halo, scale, rows
        y: torch.Tensor | None = None
        for read, used, written in _bands(x.shape[-2], rows, halo, scale):
            part = f(x[..., read, :])
            if y is None:
                y = part.new_empty((*part.shape[:-2], scale * x.shape[-2], part.shape[-1]))
            y[..., written, :] = part[..., used, :]
            del part  # must not be alive beside the next one
        assert y is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = torch.zeros_like(x)
        for read, used, written in _bands(x.shape[-2], ctx.rows, ctx.halo, ctx.scale):
            band = x[..., read, :].detach().requires_grad_()
            with torch.enable_grad():
                part = ctx.f(band)[..., used, :]
            (d_band,) = torch.autograd.grad(part, band, g[..., written, :])
            dx[..., read, :] += d_band
            del part, band, d_band
        return dx, None, None, None, None


def _bands(height: int, rows: int, halo: int, scale: int) -> Iterator[tuple[slice, slice, slice]]:
    """For each band: its rows of x with the halo, those of its result to use, and their place in y."""
    for span in spans(height, rows):
        read = slice(max(0, span.start - halo), min(height, span.stop + halo))
        used = slice(scale * (span.start - read.start), scale * (span.stop - read.start))
        yield read, used, slice(scale * span.start, scale * span.stop)
