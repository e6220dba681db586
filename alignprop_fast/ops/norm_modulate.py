"""norm_modulate: the norm before or after a sublayer of a diffusion transformer, with all that is done around it.

    s = x + gate * branch        y = xhat * weight * (one + scale) + shift

xhat is s after layer norm (Ba et al. 2016) or RMS norm (Zhang & Sennrich 2019); scale, shift and gate are adaLN's
modulation (Peebles & Xie 2023). With one = 0 and x' as the shift, y = x' + scale * norm(branch), as in Z-Image.

It keeps s and one or two numbers per token. Weights are frozen. Modulations mostly are, since no adapter lies before
them; their gradients, and what these need, are made only if asked for.
"""

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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The kernel's results: y, s (None without a branch), mean (None for rms) and rstd [T]."""
    s = x if branch is None else _sum(x, branch, gate).contiguous()
    if rms:
        wide = _wide(s)
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        xhat, mean = wide * rstd, None
        y = xhat.to(s.dtype) if weight is None else (xhat.to(weight.dtype) * weight).to(s.dtype)
    else:
        # A shift of all tokens without a scale is the layer norm's own.
        beta = shift if scale is None and shift is not None and shift.ndim == 1 else None
        y, mean, rstd = torch.native_layer_norm(s, s.shape[-1:], weight, beta, eps)
        shift = shift if beta is None else None
    if scale is not None:
        y = y * (one + scale) if shift is None else torch.addcmul(shift, y, one + scale)
    elif shift is not None:
        y = y + shift
    return y, None if branch is None else s, None if mean is None else mean.flatten(), rstd.flatten()


def _plain_backward(
    g: Tensor,
    h: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    one: float,
    rms: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of the branch (None without a gate); mean and rstd may come from the kernel."""
    c = g if scale is None else g * (one + scale)
    if rms:
        c, xhat = _wide(c if weight is None else c * weight), _normed(x, None, mean, rstd)
        along = (c * xhat).mean(-1, keepdim=True)
        dx = ((c - xhat * along) * rstd.view(*x.shape[:-1], 1)).to(x.dtype)
    else:
        statistics = (None if t is None else t.view(*x.shape[:-1], 1) for t in (mean, rstd))
        wanted = [True, False, False]
        dx = torch.ops.aten.native_layer_norm_backward(c, x, x.shape[-1:], *statistics, weight, None, wanted)[0]
    dx = dx if h is None else dx.add_(h)
    return dx, None if gate is None else dx * gate


def _normed(x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """xhat * weight from the statistics, at least in fp32."""
    centred = _wide(x) if mean is None else _wide(x) - mean.view(*x.shape[:-1], 1)
    xhat = centred * rstd.view(*x.shape[:-1], 1)
    return xhat if weight is None else xhat * weight


@cache
def _kernels() -> ModuleType:
    """Imported at the first call: Triton may be missing."""
    from alignprop_fast.kernels import norm_modulate as kernels

    return kernels


def _launch_forward(*inputs: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    return _kernels().norm_modulate_forward(*inputs)


def _launch_backward(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    return _kernels().norm_modulate_backward(*inputs)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape)
    rstd = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    return y, x.new_empty(0) if branch is None else torch.empty_like(y), mean, rstd


def _fake_backward(
    g: Tensor,
    h: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    one: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if gate is None else x.shape)


_triton_forward = Launch("norm_modulate_forward", "norm_modulate", _launch_forward, _plain_forward, _fake_forward)
_triton_backward = Launch("norm_modulate_backward", "norm_modulate", _launch_backward, _plain_backward, _fake_backward)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """y, s (x without a branch), mean (None for rms) and rstd [T]."""
    x = inputs[0]
    run = _triton_forward if backend(x) == "triton" else _plain_forward
    y, s, mean, rstd = run(*inputs)
    # A traced call returns empty tensors in place of None.
    return y, x if s is None or inputs[1] is None else s, None if inputs[-1] else mean, rstd


class _NormModulate(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
        _, branch, gate, weight, scale, shift, _, one, _ = inputs
        y, s, mean, rstd = _forward(*inputs)
        gate_learns = gate is not None and ctx.needs_input_grad[2]
        ctx.save_for_backward(s, gate, weight, scale, mean, rstd, branch if gate_learns else None)
        ctx.form = one, None if shift is None else shift.shape
        return y if branch is None else (y, s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, h: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, gate, weight, scale, mean, rstd, branch = ctx.saved_tensors
        one, shift_shape = ctx.form
        run = _triton_backward if backend(x) == "triton" else _plain_backward
        dx, dbranch = run(g, h, x, gate, weight, scale, mean, rstd, one, mean is None)
        dgate = dscale = dshift = None
        if branch is not None:
            dgate = (dx * branch).sum_to_size(gate.shape)
        if ctx.needs_input_grad[4]:
            dscale = (g * _normed(x, weight, mean, rstd)).sum_to_size(scale.shape).to(scale.dtype)
        if ctx.needs_input_grad[5]:
            dshift = g.sum_to_size(shift_shape)
        of_branch = (dx if gate is None else dbranch) if ctx.needs_input_grad[1] else None
        return dx, of_branch, dgate, None, dscale, dshift, None, None, None


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
    inputs = (x, branch, gate, weight, scale, shift, eps, one, rms)
    if torch.is_grad_enabled():
        return _NormModulate.apply(*inputs)
    y, s, _, _ = _forward(*inputs)
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
