"""frozen_conv2d: a convolution whose weights never learn, so that its backward pass needs only the weights.

    y = conv(x, W) + b        dx = conv_transpose(g, W)

Stock PyTorch also saves x, and so do torch.compile's partitioners, because `convolution_backward` takes the input even
if only dx is needed. Here the backward pass does not need x.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alignprop_fast.ops import switched_off
from alignprop_fast.ops.backend import Function

Pair = tuple[int, ...]


def frozen_conv2d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> torch.Tensor:
    """Plain PyTorch, which saves x."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


class _FrozenConv2d(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.geometry = x.shape[2:], (stride, padding, dilation, groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        # Rows of x that a stride above one skips have a gradient of zero.
        missing = tuple(
            ctx.size[d]
            - ((g.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (weight.shape[2 + d] - 1) + 1)
            for d in range(2)
        )
        dx = F.conv_transpose2d(g, weight, None, stride, padding, missing, groups, dilation)
        return dx, None, None, None, None, None, None


def frozen_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> torch.Tensor:
    """2-d convolution that is differentiable only in x and does not keep x.

    x: [B, C, H, W]; weight: [O, C / groups, kh, kw] and bias: [O], both frozen; returns [B, O, H', W'].
    """
    if switched_off.reason("frozen_conv2d") is not None:
        return frozen_conv2d_reference(x, weight, bias, stride, padding, dilation, groups)
    return _FrozenConv2d.apply(x, weight, bias, stride, padding, dilation, groups)
