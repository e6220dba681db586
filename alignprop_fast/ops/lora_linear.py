"""lora_linear: a frozen linear layer with a low-rank adapter, y = x W^T + b + s (x A^T) B^T (Hu et al. 2021, eq. 3).

W and b never learn. With g the gradient of y and u = s g B:

    dx = g W + u A        dA = u^T x        dB = s g^T (x A^T)

Saves x and the weights, once, in x's dtype: the adapters are cast, never x. (PEFT casts x for adapters in fp32, and
saves the copy of each adapter.) x A^T is made again: it costs r / O of the forward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alignprop_fast.ops.kept import Kind, kept


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Plain PyTorch. x: [..., I]; weight: [O, I]; bias: [O]; down: [R, I]; up: [O, R]; returns [..., O]."""
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def _merged(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """W + s B A: O I R multiplications once, instead of (O + I) R for every token and two more passes over y."""
    return torch.addmm(weight, up.to(weight.dtype), down.to(weight.dtype), alpha=scale)


def _merges(x: torch.Tensor) -> bool:
    """Whether the adapter may be merged into W on the fly: half precision would round it away."""
    return x.dtype in (torch.float32, torch.float64)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor | None,
    up: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    if down is None or up is None:
        return F.linear(x, weight, bias)
    if _merges(x):
        return F.linear(x, _merged(weight, down, up, scale), bias)
    y = F.linear(x, weight, bias)
    low = F.linear(x, down.to(x.dtype)).flatten(0, -2)
    return y.view(-1, y.shape[-1]).addmm_(low, up.to(x.dtype).T, alpha=scale).view_as(y)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor | None,
        up: torch.Tensor | None,
        scale: float,
        keep: Kind | None,
    ) -> torch.Tensor:
        # Without a learning adapter the gradient needs the weights alone.
        learns = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        ctx.save_for_backward(x if learns else None, weight, down, up)
        ctx.scale = scale
        return kept(keep, lambda: (_forward(x, weight, bias, down, up, scale),))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        dx = d_down = d_up = None
        if down is None:
            return (g @ weight if ctx.needs_input_grad[0] else None), None, None, None, None, None, None
        narrow_down, narrow_up = down.to(g.dtype), up.to(g.dtype)
        g_TO = g.reshape(-1, g.shape[-1])
        if ctx.needs_input_grad[0]:
            if _merges(g):
                dx = g @ _merged(weight, down, up, ctx.scale)
            else:
                dx = (g_TO @ weight).addmm_(g_TO @ narrow_up, narrow_down, alpha=ctx.scale).view(*g.shape[:-1], -1)
        if x is not None:
            x_TI = x.reshape(-1, x.shape[-1])
            if ctx.needs_input_grad[3]:
                d_down = ctx.scale * ((g_TO @ narrow_up).T @ x_TI).to(down.dtype)
            if ctx.needs_input_grad[4]:
                d_up = ctx.scale * (g_TO.T @ (x_TI @ narrow_down.T)).to(up.dtype)
        return dx, None, None, d_down, d_up, None, None


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    scale: float = 1.0,
    keep: Kind | None = None,
) -> torch.Tensor:
    """x W^T + b + scale (x down^T) up^T, differentiable in x and the adapter.

    Args:
        x: [..., I], any strides.
        weight, bias: [O, I] and [O], frozen, in x's dtype.
        down, up: the adapter, [R, I] and [O, R] in any floating dtype; None for a frozen layer without one.
        scale: the adapter's scaling, alpha / R.
        keep: the kind of result that this is to a segment that runs again (`ops.kept`).

    Returns:
        [..., O] in x's dtype.
    """
    return _LoraLinear.apply(x, weight, bias, down, up, scale, keep)
