"""group_norm_silu: y = silu(gamma * normalised(x) + beta), the two as one op; gamma and beta never learn.

Keeps x and two numbers per group. Stock autograd keeps the norm's output as well (silu's input); here it comes back in
one pass, since with mean and deviation at hand it is an affine map of x per channel (Wu & He 2018; Ramachandran 2017).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def group_norm_silu_reference(
    x: torch.Tensor, groups: int, gamma: torch.Tensor, beta: torch.Tensor, eps: float
) -> torch.Tensor:
    """Plain PyTorch. x: [B, C, H, W]; gamma, beta: [C]."""
    return F.silu(F.group_norm(x, groups, gamma, beta, eps))


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, groups: int, gamma: torch.Tensor, beta: torch.Tensor, eps: float
    ) -> torch.Tensor:
        b, c, h, w = x.shape
        x = x.contiguous(memory_format=_memory_format(x))
        y, mean, rstd = torch.native_group_norm(x, gamma, beta, b, c, h * w, groups, eps)
        ctx.save_for_backward(x, gamma, beta, mean, rstd)
        ctx.groups = groups
        return F.silu(y, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gamma, beta, mean, rstd = ctx.saved_tensors
        b, c, h, w = x.shape
        # native_group_norm_backward reads both tensors in the memory format of one, unchecked.
        g = g.contiguous(memory_format=_memory_format(x))
        per_group = c // ctx.groups
        scale_BC = rstd.repeat_interleave(per_group, dim=1) * gamma
        shift_BC = beta - mean.repeat_interleave(per_group, dim=1) * scale_BC
        y = torch.addcmul(shift_BC[:, :, None, None], x, scale_BC[:, :, None, None])
        dy = torch.ops.aten.silu_backward(g, y.to(g.dtype))
        dx = torch.ops.aten.native_group_norm_backward(
            dy, x, mean, rstd, gamma, b, c, h * w, ctx.groups, [True, False, False]
        )[0]
        return dx, None, None, None, None


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    """The format that native_group_norm runs in: on CUDA it knows the contiguous one alone."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() and not x.is_cuda
    return torch.channels_last if channels_last else torch.contiguous_format


def group_norm_silu(
    x: torch.Tensor, groups: int, gamma: torch.Tensor, beta: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """silu(group_norm(x)), differentiable in x alone; keeps x and mean and deviation per group.

    x: [B, C, H, W] in any memory format; gamma, beta: [C], frozen; returns [B, C, H, W].
    """
    return _GroupNormSiLU.apply(x, groups, gamma, beta, eps)
