"""Activations of diffusion transformers that keep their projection alone (Shazeer 2020).

    gelu_tanh(v)        f(v)                            f: gelu by the formula with tanh
    geglu([u, v])       u f(v)                          f: gelu
    swiglu([v, u])      u f(v), v and u also apart      f: silu

    dv = g u f'(v)        du = g f(v)

Stock autograd keeps u, v and f(v). Here f(v) is computed again, which costs one pass over v and saves a third. An
activation can write its result beside another tensor, which saves the pass that joins the two.
"""

from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alignprop_fast.ops import backend as backends
from alignprop_fast.ops.backend import Function, Launch, only_plain

Tensor = torch.Tensor
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
}
_BACKWARD_INTO = {"gelu": torch.ops.aten.gelu_backward.grad_input, "silu": torch.ops.aten.silu_backward.grad_input}
# The functions of a gate that are applied to the second half of one projection; of others to the first.
_SECOND = "gelu"


def gelu_tanh_reference(v: Tensor, beside: Tensor | None = None) -> Tensor:
    """Plain PyTorch. v: [..., D], beside: [..., E]; returns [..., E + D]."""
    return _joined(_FUNCTIONS["gelu_tanh"](v), beside)


def geglu_reference(uv: Tensor) -> Tensor:
    """Plain PyTorch. uv: [..., 2 D]; returns [..., D]."""
    u, v = uv.chunk(2, dim=-1)
    return u * F.gelu(v)


def swiglu_reference(v: Tensor, u: Tensor | None = None, beside: Tensor | None = None) -> Tensor:
    """Plain PyTorch. v, u: [..., D], or v: [..., 2 D] with both; beside: [..., E]. Returns [..., E + D]."""
    v, u = (v, u) if u is not None else v.chunk(2, dim=-1)
    return _joined(F.silu(v) * u, beside)


def backend(x: Tensor) -> str:
    """The implementation for x: "triton" or "reference"."""
    return backends.backend(x, "activation")


def _joined(y: Tensor, beside: Tensor | None) -> Tensor:
    return y if beside is None else torch.cat([beside, y], dim=-1)


def _parts(x: Tensor, u: Tensor | None, function: str) -> tuple[Tensor, Tensor | None]:
    """v and u as views; no u for gelu_tanh. x: v, or both in one."""
    if u is not None or function == "gelu_tanh":
        return x, u
    first, second = x.chunk(2, dim=-1)
    return (second, first) if function == _SECOND else (first, second)


def _plain_forward(x: Tensor, u: Tensor | None, beside: Tensor | None, function: str) -> Tensor:
    v, gate = _parts(x, u, function)
    y = _FUNCTIONS[function](v)
    return _joined(y if gate is None else gate * y, beside)


def _plain_backward(g: Tensor, x: Tensor, u: Tensor | None, function: str) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and u (None without u)."""
    v, gate = _parts(x, u, function)
    if gate is None:
        return _BACKWARD[function](g, v), None
    if u is not None:
        return _BACKWARD[function](g * gate, v), g * _FUNCTIONS[function](v)
    if torch.compiler.is_compiling():
        # The tracer refuses a strided `out`; compiled code writes in place anyway.
        dv, du = _BACKWARD[function](g * gate, v), g * _FUNCTIONS[function](v)
        return torch.cat([du, dv] if function == _SECOND else [dv, du], dim=-1), None
    dx = x.new_empty(x.shape)
    into_v, into_u = _parts(dx, None, function)
    torch.mul(g, _FUNCTIONS[function](v), out=into_u)
    _BACKWARD_INTO[function](g * gate, v, grad_input=into_v)
    return dx, None


@cache
def _kernels() -> ModuleType:
    """Imported at the first call: Triton may be missing."""
    from alignprop_fast.kernels import activation as kernels

    return kernels


def _launch_forward(x: Tensor, u: Tensor | None, beside: Tensor | None, function: str) -> Tensor:
    return _kernels().activation_forward(*_parts(x, u, function), function, beside)


def _launch_backward(g: Tensor, x: Tensor, u: Tensor | None, function: str) -> tuple[Tensor, Tensor | None]:
    dx, du = x.new_empty(x.shape), None if u is None else u.new_empty(u.shape)
    grads = _parts(dx, du, function)
    _kernels().activation_backward(g, *_parts(x, u, function), *grads, function)
    return dx, du


def _fake_forward(x: Tensor, u: Tensor | None, beside: Tensor | None, function: str) -> Tensor:
    width = _parts(x, u, function)[0].shape[-1] + (0 if beside is None else beside.shape[-1])
    return x.new_empty((*x.shape[:-1], width))


def _fake_backward(g: Tensor, x: Tensor, u: Tensor | None, function: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if u is None else u.shape)


_triton_forward = Launch("activation_forward", "activation", _launch_forward, _plain_forward, _fake_forward)
_triton_backward = Launch("activation_backward", "activation", _launch_backward, _plain_backward, _fake_backward)


def _forward(x: Tensor, u: Tensor | None, beside: Tensor | None, function: str) -> Tensor:
    return (_triton_forward if backend(x) == "triton" else _plain_forward)(x, u, beside, function)


class _Activation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor | None, beside: Tensor | None, function: str) -> Tensor:
        ctx.save_for_backward(x, u)
        ctx.function, ctx.extra = function, 0 if beside is None else beside.shape[-1]
        return _forward(x, u, beside, function)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, u = ctx.saved_tensors
        run = _triton_backward if backend(x) == "triton" else _plain_backward
        dx, du = run(g[..., ctx.extra :], x, u, ctx.function)
        return dx, None if u is None else du, g[..., : ctx.extra] if ctx.extra else None, None


def _activated(x: Tensor, u: Tensor | None, beside: Tensor | None, function: str) -> Tensor:
    if only_plain(x):
        return _plain_forward(x, u, beside, function)
    run = _Activation.apply if torch.is_grad_enabled() else _forward
    return run(x, u, beside, function)


def gelu_tanh(v: Tensor, beside: Tensor | None = None) -> Tensor:
    """gelu(v) by the formula with tanh, [..., D]; after `beside` [..., E] if given. Keeps only v."""
    return _activated(v, None, beside, "gelu_tanh")


def geglu(uv: Tensor) -> Tensor:
    """u * gelu(v) of uv = [u, v], [..., 2 D] -> [..., D]; keeps only uv for the backward pass."""
    return _activated(uv, None, None, "gelu")


def swiglu(v: Tensor, u: Tensor | None = None, beside: Tensor | None = None) -> Tensor:
    """silu(v) * u, [..., D], after `beside` [..., E] if given; keeps only v and u.

    v: [..., D], or without u the projection [v, u], [..., 2 D], which may be a part of a larger one.
    """
    return _activated(v, u, beside, "silu")
