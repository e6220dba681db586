"""geglu: the gated activation of diffusion transformers, y = u * gelu(v) for a projection [u, v] (Shazeer 2020).

    du = g gelu(v)        dv = g u gelu'(v)

Stock autograd keeps u, v and gelu(v); here gelu(v) is computed again, which costs one pass over v and saves a third.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def geglu_reference(uv: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch. uv: [..., 2 D]; returns [..., D]."""
    u, v = uv.chunk(2, dim=-1)
    return u * F.gelu(v)


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, uv: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(uv)
        return geglu_reference(uv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (uv,) = ctx.saved_tensors
        u, v = uv.chunk(2, dim=-1)
        duv = torch.empty_like(uv)
        du, dv = duv.chunk(2, dim=-1)
        torch.mul(g, F.gelu(v), out=du)
        torch.ops.aten.gelu_backward.grad_input(g * u, v, grad_input=dv)
        return duv


def geglu(uv: torch.Tensor) -> torch.Tensor:
    """u * gelu(v) of uv = [u, v] with shape [..., 2 D] -> [..., D]; keeps uv alone for the backward pass."""
    return _GEGLU.apply(uv)
