"""banded_conv: the frozen 3x3 convolutions of an image decoder by bands of rows, with the whole image's results.

    norm_conv:      y = conv(silu(norm(x)))
    upsample_conv:  y = conv(nearest(x, 2))

Group norm needs the whole image, so its statistics come first, in a pass that keeps nothing. SiLU and convolution then
take a band of rows and one more row on either side (its halo), in both directions. So a normalised, activated or
upsampled image never exists as a whole. norm_conv keeps x, mean and deviation; upsample_conv does not keep x.

Backward of norm_conv, by bands, with z = gamma xhat + beta and xhat = (x - mean) / deviation (Wu & He 2018):

    dz = silu'(z) conv_transpose(g)        dx = (gamma dz - S1 / n - xhat S2 / n) / deviation
    S1 = sum of gamma dz over the n elements of the group, S2 = sum of gamma dz xhat

One pass writes dz into dx's memory and sums it; a pointwise pass turns it into dx. Pointwise work runs in fp32 (or
wider) and is rounded once. Beside input and output it takes about five bands in 16 bits, three in 32. It loses on small
images, whose bands do not fill a GPU.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alignprop_fast.ops import switched_off

MIN_ROWS, BANDS = 16, 32


class NormConv(NamedTuple):
    """A frozen layer conv(silu(group_norm(x))) with a 3x3 convolution of stride 1 and padding 1."""

    groups: int
    gamma: torch.Tensor  # [C]
    beta: torch.Tensor  # [C]
    eps: float
    weight: torch.Tensor  # [O, C, 3, 3]
    bias: torch.Tensor | None  # [O]


def band_rows(rows: int | None, height: int) -> int:
    """The height of a band: as given, or chosen for the image's height if None.

    Raises:
        ValueError: fewer than one row.
    """
    if rows is None:
        return max(MIN_ROWS, -(-height // BANDS))
    if rows < 1:
        raise ValueError(f"bands of {rows} rows: use 1 or more, or None to have it chosen")
    return rows


def norm_conv_reference(x: torch.Tensor, layer: NormConv) -> torch.Tensor:
    """Plain PyTorch, the whole image at once. x: [B, C, H, W]."""
    z = F.group_norm(x, layer.groups, layer.gamma, layer.beta, layer.eps)
    return F.conv2d(F.silu(z), layer.weight, layer.bias, padding=1)


def upsample_conv_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Plain PyTorch, the whole image at once. x: [B, C, H, W]."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def spans(height: int, rows: int) -> Iterator[slice]:
    """The rows of each band."""
    return (slice(start, min(start + rows, height)) for start in range(0, height, rows))


def halo_bands(
    x: torch.Tensor, rows: int, prepare: Callable[[torch.Tensor], torch.Tensor] = lambda band: band
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each band's rows in x [B, C, H, W], and a prepared copy of them with one more row on either side.

    `prepare` works on single pixels; beyond the border its result counts as zero. The caller may overwrite a band's
    rows in x when it has the band, because the next band's halo is already copied.
    """
    above = x[:, :, :1]
    for span in spans(x.shape[2], rows):
        last = span.stop == x.shape[2]
        below = x[:, :, -1:] if last else x[:, :, span.stop : span.stop + 1]
        kept_row = x[:, :, span.stop - 1 : span.stop].clone()
        yield span, _zero_beyond(prepare(torch.cat((above, x[:, :, span], below), 2)), span.start == 0, last)
        above = kept_row


def _zero_beyond(band: torch.Tensor, top: bool, bottom: bool) -> torch.Tensor:
    if top:
        band[:, :, :1] = 0
    if bottom:
        band[:, :, -1:] = 0
    return band


def conv_band(band: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The convolution's rows for a band that has its halo."""
    return F.conv2d(band, weight, bias, padding=(0, 1))


def transposed(weight: torch.Tensor) -> torch.Tensor:
    """The weight whose convolution is the transpose of this one's."""
    return weight.transpose(0, 1).flip(2, 3)


def memory_format(x: torch.Tensor) -> torch.memory_format:
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


def empty_like_rows(x: torch.Tensor, channels: int) -> torch.Tensor:
    """An uninitialised result [B, channels, H, W] in the dtype and memory format of x [B, C, H, W]."""
    return _empty(x, (x.shape[0], channels, *x.shape[2:]), memory_format(x))


def _empty(x: torch.Tensor, shape: tuple[int, ...], format: torch.memory_format) -> torch.Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format)


class Normaliser:
    """Group norm with SiLU at a given mean and deviation, for any rows of their image."""

    def __init__(self, layer: NormConv, mean: torch.Tensor, rstd: torch.Tensor):
        """mean, rstd: [B, C, 1, 1], the same for all channels of a group."""
        self.mean, self.rstd, self.groups = mean, rstd, layer.groups
        self.scale = rstd * layer.gamma[:, None, None]
        self.shift = layer.beta[:, None, None] - mean * self.scale

    def normalised(self, band: torch.Tensor) -> torch.Tensor:
        """In fp32 or wider, because the affine form rounds too much in 16 bits."""
        return torch.addcmul(self.shift, band, self.scale)

    def activated(self, band: torch.Tensor) -> torch.Tensor:
        return F.silu(self.normalised(band), inplace=True).to(band.dtype)

    def per_group(self, sums_BC11: torch.Tensor) -> torch.Tensor:
        """Means over the channels of each group, for each channel: [B, C, 1, 1]."""
        return _group_mean(sums_BC11, self.groups)


def _group_mean(x_BC11: torch.Tensor, groups: int) -> torch.Tensor:
    grouped = x_BC11.unflatten(1, (groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1, 2)


def statistics(x: torch.Tensor, layer: NormConv, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and reciprocal deviation of each channel's group, both [B, C, 1, 1] in fp32 or wider.

    Computed by bands, each about its own mean, and merged without cancellation (Chan, Golub & LeVeque 1983).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    means, variances = [], []
    for span in spans(x.shape[2], rows):
        band = x[:, :, span].to(wide)
        means.append(band.mean((2, 3), keepdim=True))
        variances.append((band - means[-1]).square_().mean((2, 3), keepdim=True))
        del band  # must not be alive beside the next one
    mean = _over_bands(torch.stack(means), x.shape[2], rows)
    apart = torch.stack(means).sub_(mean).square_()
    variance = _over_bands(torch.stack(variances).add_(apart), x.shape[2], rows)
    group_mean = _group_mean(mean, layer.groups)
    variance = _group_mean(variance + (mean - group_mean).square(), layer.groups)
    return group_mean, torch.rsqrt(variance + layer.eps)


def _over_bands(of_each: torch.Tensor, height: int, rows: int) -> torch.Tensor:
    """The mean over an image's rows from the means over its bands [bands, ...]; only the last band may be shorter."""
    last = height - (len(of_each) - 1) * rows
    return (of_each[:-1].sum(0) * rows + of_each[-1] * last) / height


def norm_conv_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    norm: Normaliser,
    weight: torch.Tensor,
    rows: int,
    dx: torch.Tensor,
    add: Callable[[slice], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Write the gradient of conv(silu(norm(x))) for x into dx, given g, the gradient of its result.

    add: rows to add. dx may be g itself, or x itself. In the second case dz has no place, and its convolution runs
    twice.
    """
    flipped = transposed(weight)

    def dz_bands() -> Iterator[tuple[slice, torch.Tensor]]:
        for span, band in halo_bands(g, rows):
            band = conv_band(band, flipped)
            yield span, torch.ops.aten.silu_backward(band, norm.normalised(x[:, :, span]))

    sums = sums_x = torch.zeros_like(norm.mean)
    for span, dz in dz_bands():
        sums = sums + dz.sum((2, 3), keepdim=True)
        sums_x = sums_x + (x[:, :, span] - norm.mean).mul_(dz).sum((2, 3), keepdim=True)
        if dx is not x:
            dx[:, :, span] = dz
        del dz  # must not be alive beside the next band's
    pixels = x.shape[2] * x.shape[3]
    # With the mean folded in, dx = scale dz + slope x + offset.
    slope = -norm.rstd.square() * norm.per_group(norm.scale * sums_x) / pixels
    offset = -norm.per_group(norm.scale * sums) / pixels - slope * norm.mean
    stored = ((span, dx[:, :, span]) for span in spans(x.shape[2], rows))
    for span, dz in dz_bands() if dx is x else stored:
        band = torch.addcmul(offset, x[:, :, span], slope).addcmul_(dz, norm.scale)
        del dz
        dx[:, :, span] = band if add is None else band.add_(add(span))
        del band
    return dx


class _NormConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: NormConv, rows: int) -> torch.Tensor:
        mean, rstd = statistics(x, layer, rows)
        ctx.save_for_backward(x, mean, rstd)
        # The layer is frozen, so autograd need not see its tensors.
        ctx.layer, ctx.rows = layer, rows
        y = empty_like_rows(x, layer.weight.shape[0])
        for span, band in halo_bands(x, rows, Normaliser(layer, mean, rstd).activated):
            y[:, :, span] = conv_band(band, layer.weight, layer.bias)
            del band
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mean, rstd = ctx.saved_tensors
        norm = Normaliser(ctx.layer, mean, rstd)
        dx = empty_like_rows(x, x.shape[1])
        return norm_conv_backward(g, x, norm, ctx.layer.weight, ctx.rows, dx), None, None


class _UpsampleConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.rows, ctx.shape, ctx.format = rows, x.shape, memory_format(x)
        b, _, h, w = x.shape
        y = _empty(x, (b, weight.shape[0], 2 * h, 2 * w), ctx.format)
        for span, band in halo_bands(x, rows):
            # Upsampling made two rows of the halo's one; the convolution needs one.
            band = F.interpolate(band, scale_factor=2.0, mode="nearest")[:, :, 1:-1]
            y[:, :, 2 * span.start : 2 * span.stop] = conv_band(band, weight, bias)
            del band
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        flipped = transposed(weight)
        dx = _empty(g, ctx.shape, ctx.format)
        for span, band in halo_bands(g, 2 * ctx.rows):
            band = conv_band(band, flipped)
            # The sum over the four pixels that came from one.
            dx[:, :, span.start // 2 : span.stop // 2] = F.avg_pool2d(band, 2, divisor_override=1)
            del band
        return dx, None, None, None


def norm_conv(x: torch.Tensor, layer: NormConv, rows: int | None = None) -> torch.Tensor:
    """conv(silu(group_norm(x))) by bands of rows, differentiable only in x; keeps x, mean and deviation.

    Args:
        x: [B, C, H, W], contiguous or channels_last, as the result will be.
        layer: frozen, of x's dtype.
        rows: height of a band; None: 1/32 of the height, at least 16.

    Returns:
        [B, O, H, W].
    """
    if switched_off.reason("banded_conv") is not None:
        return norm_conv_reference(x, layer)
    return _NormConv.apply(x, layer, band_rows(rows, x.shape[2]))


def upsample_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, rows: int | None = None
) -> torch.Tensor:
    """conv(nearest(x, 2)) by bands of rows, differentiable only in x; does not keep x.

    Args:
        x: [B, C, H, W], contiguous or channels_last, as the result will be.
        weight: [O, C, 3, 3]; bias: [O]; frozen, of x's dtype; stride 1, padding 1.
        rows: height of a band of the result; None: 1/32 of its height, at least 16.

    Returns:
        [B, O, 2 H, 2 W].
    """
    if switched_off.reason("banded_conv") is not None:
        return upsample_conv_reference(x, weight, bias)
    return _UpsampleConv.apply(x, weight, bias, max(1, band_rows(rows, 2 * x.shape[2]) // 2))
