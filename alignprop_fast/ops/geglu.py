"""geglu: the gated activation of diffusion transformers, y = u * gelu(v) for a projection [u, v] (Shazeer 2020).

    du = g gelu(v)        dv = g u gelu'(v)

Stock autograd keeps u, v and gelu(v). Here gelu(v) is computed again, which costs one pass over v and saves a third.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alignprop_fast.ops import backend as backends
from alignprop_fast.ops.backend import Function, Launch, only_plain


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


def _launch_forward(uv: torch.Tensor) -> torch.Tensor:
    from alignprop_fast.kernels import geglu as kernels

    return kernels.geglu_forward(uv)


def _launch_backward(g: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    from alignprop_fast.kernels import geglu as kernels

    return kernels.geglu_backward(g, uv)


def _fake_forward(uv: torch.Tensor) -> torch.Tensor:
    return uv.new_empty((*uv.shape[:-1], uv.shape[-1] // 2))


def _fake_backward(g: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    return uv.new_empty(uv.shape)


_triton_forward = Launch("geglu_forward", "geglu", _launch_forward, geglu_reference, _fake_forward)
_triton_backward = Launch("geglu_backward", "geglu", _launch_backward, _plain_backward, _fake_backward)


def _forward(uv: torch.Tensor) -> torch.Tensor:
    return (_triton_forward if backend(uv) == "triton" else geglu_reference)(uv)


class _GEGLU(Function):
    @staticmethod
    def forward(ctx: Any, uv: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(uv)
        return _forward(uv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (uv,) = ctx.saved_tensors
        return (_triton_backward if backend(uv) == "triton" else _plain_backward)(g, uv)


def geglu(uv: torch.Tensor) -> torch.Tensor:
    """u * gelu(v) of uv = [u, v], [..., 2 D] -> [..., D]; keeps only uv for the backward pass."""
    if only_plain(uv):
        return geglu_reference(uv)
    return _GEGLU.apply(uv) if torch.is_grad_enabled() else _forward(uv)
