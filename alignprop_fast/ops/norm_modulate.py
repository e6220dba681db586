"""norm_modulate: the norm before or after a sublayer of a diffusion transformer, with all that is done around it.

    s = x + gate * branch        y = xhat * weight * (one + scale) + shift

xhat is s after layer norm (Ba et al. 2016) or RMS norm (Zhang & Sennrich 2019); scale, shift and gate are adaLN's
modulation (Peebles & Xie 2023). With one = 0 and x' as the shift, y = x' + scale * norm(branch), as in Z-Image.

It keeps s, and without the kernel mean and rstd of each token. Weights are frozen. Modulations mostly are, since no
adapter lies before them; their gradients, and what these need, are made only if asked for.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, overload

import torch
from torch.autograd.function import once_differentiable

from alignprop_fast.ops import backend as backends
from alignprop_fast.ops.backend import Function, Launch, only_plain

Tensor = torch.Tensor
# A row must fit the registers of one thread block (kernels.norm_modulate.MAX_WIDTH).
MAX_TRITON_WIDTH = 8192


def norm_modulate_reference(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    one: float = 1.0,
    rms: bool = False,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain PyTorch; see `norm_modulate`."""
    s = _sum(x, branch, gate)
    shape, wide = s.shape[-1:], s if weight is None else s.to(weight.dtype)
    y = torch.rms_norm(wide, shape, weight, eps) if rms else torch.layer_norm(wide, shape, weight, None, eps)
    y = y.to(s.dtype)
    if scale is not None:
        y = y * (one + scale)
    if shift is not None:
        y = y + shift
    return y if branch is None else (y, s)


def backend(x: Tensor) -> str:
    """The implementation for x: "triton" on a CUDA device up to 8192 channels, else "reference"."""
    return backends.backend(x, "norm_modulate") if x.shape[-1] <= MAX_TRITON_WIDTH else "reference"


def _sum(x: Tensor, branch: Tensor | None, gate: Tensor | None) -> Tensor:
    if branch is None:
        return x
    return x + branch if gate is None else torch.addcmul(x, gate, branch)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _as(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y in this dtype. PyTorch 2.11 compiles a function to one without gradients if its result is that of a `.to` or
    `.contiguous` that did nothing."""
    return y if y.dtype == dtype else y.to(dtype)


def _plain_forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    one: float,
    rms: bool,
) -> tuple[Any, ...]:
    """y, s (None without a branch), and mean (not for rms) and rstd [..., 1] for `_plain_backward`."""
    s = x if branch is None else _sum(x.contiguous(), branch, gate)
    if rms:
        wide = _wide(s)
        statistics: Sequence[Tensor] = _statistics(wide, eps, rms)
        xhat = wide * statistics[0]
        y = _as(xhat if weight is None else xhat.to(weight.dtype) * weight, s.dtype)
    else:
        # A shift of all tokens without a scale is the layer norm's own.
        beta = shift if scale is None and shift is not None and shift.ndim == 1 else None
        y, *statistics = torch.native_layer_norm(s, s.shape[-1:], weight, beta, eps)
        shift = shift if beta is None else None
    if scale is not None:
        y = y * (one + scale) if shift is None else torch.addcmul(shift, y, one + scale)
    elif shift is not None:
        y = y + shift
    return y, None if branch is None else s, *statistics


def _statistics(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, ...]:
    """(mean, rstd), for rms (rstd,), [..., 1]."""
    if rms:
        return (torch.rsqrt(_wide(x).square().mean(-1, keepdim=True) + eps),)
    return torch.native_layer_norm(x, x.shape[-1:], None, None, eps)[1:]


def _plain_backward(
    g: Tensor,
    h: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    one: float,
    rms: bool,
    statistics: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of the branch (None without a gate). No statistics: computed again, as the kernel does."""
    *mean, rstd = statistics or _statistics(x, eps, rms)
    c = g if scale is None else g * (one + scale)
    if rms:
        c, xhat = _wide(c if weight is None else c * weight), _wide(x) * rstd
        along = (c * xhat).mean(-1, keepdim=True)
        dx = ((c - xhat * along) * rstd).to(x.dtype)
    else:
        wanted = [True, False, False]
        dx = torch.ops.aten.native_layer_norm_backward(c, x, x.shape[-1:], *mean, rstd, weight, None, wanted)[0]
    dx = dx if h is None else dx.add_(h)
    return dx, None if gate is None else dx * gate


def _normed(x: Tensor, weight: Tensor | None, eps: float, rms: bool) -> Tensor:
    """xhat * weight, at least in fp32."""
    x, shape = _wide(x), x.shape[-1:]
    xhat = torch.rms_norm(x, shape, None, eps) if rms else torch.layer_norm(x, shape, None, None, eps)
    return xhat if weight is None else xhat * weight


@cache
def _kernels() -> ModuleType:
    """Imported at the first call: Triton may be missing."""
    from alignprop_fast.kernels import norm_modulate as kernels

    return kernels


def _launch_forward(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    return _kernels().norm_modulate_forward(*inputs)


def _launch_backward(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    return _kernels().norm_modulate_backward(*inputs)


# In place of the kernels, which leave no statistics and need none.


def _forward_alone(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    return _plain_forward(*inputs)[:2]


def _backward_alone(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    g, h, x, gate, weight, scale, eps, one, rms = inputs
    return _plain_backward(g, h, x, gate, weight, scale, eps, one, rms, ())


def _fake_forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    one: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if branch is None else x.shape)


def _fake_backward(
    g: Tensor,
    h: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    one: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if gate is None else x.shape)


_triton_forward = Launch("norm_modulate_forward", "norm_modulate", _launch_forward, _forward_alone, _fake_forward)
_triton_backward = Launch("norm_modulate_backward", "norm_modulate", _launch_backward, _backward_alone, _fake_backward)


def _forward(*inputs: Any) -> tuple[Any, ...]:
    """y, s (x without a branch), and the statistics of `_plain_forward` unless the kernel ran."""
    x, branch = inputs[:2]
    run = _triton_forward if backend(x) == "triton" else _plain_forward
    y, s, *statistics = run(*inputs)
    return y, x if branch is None else s, *statistics


class _NormModulate(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        form: tuple[Tensor | None, float, float, bool],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """form: the frozen weight, which autograd would search for gradients and save; eps, one and rms."""
        weight, *numbers = form
        y, s, *statistics = _forward(x, branch, gate, weight, scale, shift, *numbers)
        gate_learns = gate is not None and ctx.needs_input_grad[2]
        ctx.save_for_backward(s, gate, scale, branch if gate_learns else None, *statistics)
        ctx.form, ctx.shift_shape = form, None if shift is None else shift.shape
        return y if branch is None else (y, s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, h: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, gate, scale, branch, *statistics = ctx.saved_tensors
        weight, eps, one, rms = ctx.form
        inputs = g, h, x, gate, weight, scale, eps, one, rms
        dx, dbranch = _triton_backward(*inputs) if backend(x) == "triton" else _plain_backward(*inputs, statistics)
        dgate = dscale = dshift = None
        if branch is not None:
            dgate = (dx * branch).sum_to_size(gate.shape)
        if ctx.needs_input_grad[3]:
            dscale = (g * _normed(x, weight, eps, rms)).sum_to_size(scale.shape).to(scale.dtype)
        if ctx.needs_input_grad[4]:
            dshift = g.sum_to_size(ctx.shift_shape)
        of_branch = (dx if gate is None else dbranch) if ctx.needs_input_grad[1] else None
        return dx, of_branch, dgate, dscale, dshift, None


@overload
def norm_modulate(
    x: Tensor,
    scale: Tensor | None = ...,
    shift: Tensor | None = ...,
    weight: Tensor | None = ...,
    eps: float = ...,
    *,
    one: float = ...,
    rms: bool = ...,
    branch: None = ...,
    gate: None = ...,
) -> Tensor: ...
@overload
def norm_modulate(
    x: Tensor,
    scale: Tensor | None = ...,
    shift: Tensor | None = ...,
    weight: Tensor | None = ...,
    eps: float = ...,
    *,
    one: float = ...,
    rms: bool = ...,
    branch: Tensor,
    gate: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    one: float = 1.0,
    rms: bool = False,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(x + gate * branch) * weight * (one + scale) + shift over the last dimension.

    Args:
        x: [B, ..., C], any strides.
        scale, shift: of the result, in x's dtype: [B, 1, C], [1, 1, C], or a row for each token like x; a shift may
            also be [C]. None: no scale (also no `one`), no shift.
        weight: [C], frozen, in x's dtype, for rms also in fp32; None for a weight of one.
        eps: added to the variance, for rms to the mean square.
        one: added to the scale.
        rms: RMS norm instead of layer norm.
        branch: like x; gate * branch is added to x first.
        gate: like scale; None: one.

    Returns:
        y like x; with a branch (y, x + gate * branch).
    """
    if only_plain(x):
        return norm_modulate_reference(x, scale, shift, weight, eps, one=one, rms=rms, branch=branch, gate=gate)
    if torch.is_grad_enabled():
        return _NormModulate.apply(x, branch, gate, scale, shift, (weight, eps, one, rms))
    y, s, *_ = _forward(x, branch, gate, weight, scale, shift, eps, one, rms)
    return y if branch is None else (y, s)


class _GatedSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        # Autograd does not save a frozen gate, because a checkpointed block repeats all that comes before the last
        # tensor that it saves.
        learns = ctx.needs_input_grad[1]
        ctx.gate = None if learns else gate
        if learns:
            ctx.save_for_backward(gate, branch)
        return torch.addcmul(x, gate, branch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gate is not None:
            return g, None, g * ctx.gate
        gate, branch = ctx.saved_tensors
        return g, (g * branch).sum_to_size(gate.shape), g * gate


def gated_sum(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch in one pass: the end of a block, after which no norm of its own follows.

    x, branch: [B, ..., C]; gate: as in `norm_modulate`. Keeps the gate.
    """
    return _GatedSum.apply(x, gate, branch) if torch.is_grad_enabled() else torch.addcmul(x, gate, branch)
