"""geglu: the gated activation of diffusion transformers, y = u * gelu(v) for a projection [u, v] (Shazeer 2020).

    du = g gelu(v)        dv = g u gelu'(v)

Stock autograd keeps u, v and gelu(v). Here gelu(v) is computed again, which costs one pass over v and saves a third.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alignprop_fast.ops import backend as backends
from alignprop_fast.ops.backend import only_plain, or_plain


def geglu_reference(uv: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch. uv: [..., 2 D]; returns [..., D]."""
    u, v = uv.chunk(2, dim=-1)
    return u * F.gelu(v)


def backend(uv: torch.Tensor) -> str:
    """The implementation for uv: "triton" or "reference"."""
    return backends.backend(uv, "geglu")


def _plain_backward(g: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    u, v = uv.chunk(2, dim=-1)
    if torch.compiler.is_compiling():
        # The tracer refuses a strided `out`; compiled code writes in place anyway.
        return torch.cat([g * F.gelu(v), torch.ops.aten.gelu_backward(g * u, v)], dim=-1)
    duv = torch.empty_like(uv)
    du, dv = duv.chunk(2, dim=-1)
    torch.mul(g, F.gelu(v), out=du)
    torch.ops.aten.gelu_backward.grad_input(g * u, v, grad_input=dv)
    return duv


@torch.library.custom_op("alignprop_fast::geglu_forward", mutates_args=())
@or_plain("geglu", geglu_reference)
def _triton_forward(uv: torch.Tensor) -> torch.Tensor:
    from alignprop_fast.kernels import geglu as kernels

    return kernels.geglu_forward(uv)


@_triton_forward.register_fake
def _(uv: torch.Tensor) -> torch.Tensor:
    return uv.new_empty((*uv.shape[:-1], uv.shape[-1] // 2))


@torch.library.custom_op("alignprop_fast::geglu_backward", mutates_args=())
@or_plain("geglu", _plain_backward)
def _triton_backward(g: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    from alignprop_fast.kernels import geglu as kernels

    return kernels.geglu_backward(g, uv)


@_triton_backward.register_fake
def _(g: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    return uv.new_empty(uv.shape)


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, uv: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(uv)
        return (_triton_forward if backend(uv) == "triton" else geglu_reference)(uv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (uv,) = ctx.saved_tensors
        return (_triton_backward if backend(uv) == "triton" else _plain_backward)(g, uv)


def geglu(uv: torch.Tensor) -> torch.Tensor:
    """u * gelu(v) of uv = [u, v], [..., 2 D] -> [..., D]; keeps only uv for the backward pass."""
    return geglu_reference(uv) if only_plain(uv) else _GEGLU.apply(uv)
