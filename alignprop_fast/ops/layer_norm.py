"""layer_norm: normalisation over the last dimension with a frozen affine map, y = gamma xhat + beta (Ba et al. 2016).

It keeps x and two numbers per token, like stock PyTorch, but never computes gradients of gamma and beta. The addition
of a residual branch runs in the same pass, forward and backward.
"""

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alignprop_fast.ops import backend as backends
from alignprop_fast.ops.backend import Function, Launch, only_plain

Tensor = torch.Tensor
# A row must fit the registers of one thread block (kernels.layer_norm.MAX_WIDTH).
MAX_TRITON_WIDTH = 8192


def layer_norm_reference(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """Plain PyTorch. x: [..., C]; gamma, beta: [C] or None."""
    return F.layer_norm(x, x.shape[-1:], gamma, beta, eps)


def backend(x: Tensor) -> str:
    """The implementation for x: "triton" on a CUDA device up to 8192 channels, else "reference"."""
    return backends.backend(x, "layer_norm") if x.shape[-1] <= MAX_TRITON_WIDTH else "reference"


def _plain_forward(
    x: Tensor, residual: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel's results: y, x + residual (empty without a residual), mean and rstd [T]."""
    s = x if residual is None else (x + residual).contiguous()
    y, mean, rstd = torch.native_layer_norm(s, s.shape[-1:], gamma, beta, eps)
    return y, x.new_empty(0) if residual is None else s, mean.flatten(), rstd.flatten()


def _plain_backward(g: Tensor, h: Tensor | None, x: Tensor, gamma: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of x; mean and rstd may come from the kernel."""
    statistics = (t.view(*x.shape[:-1], 1) for t in (mean, rstd))
    dx = torch.ops.aten.native_layer_norm_backward(g, x, x.shape[-1:], *statistics, gamma, None, [True, False, False])[
        0
    ]
    return dx if h is None else dx.add_(h)


def _launch_forward(
    x: Tensor, residual: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from alignprop_fast.kernels import layer_norm as kernels

    return kernels.layer_norm_forward(x, residual, gamma, beta, eps)


def _launch_backward(
    g: Tensor, h: Tensor | None, x: Tensor, gamma: Tensor | None, mean: Tensor, rstd: Tensor
) -> Tensor:
    from alignprop_fast.kernels import layer_norm as kernels

    return kernels.layer_norm_backward(g, h, x, gamma, mean, rstd)


def _fake_forward(
    x: Tensor, residual: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape)
    rows = x.numel() // x.shape[-1]
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return y, x.new_empty(0) if residual is None else torch.empty_like(y), mean, rstd


def _fake_backward(g: Tensor, h: Tensor | None, x: Tensor, gamma: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_triton_forward = Launch("layer_norm_forward", "layer_norm", _launch_forward, _plain_forward, _fake_forward)
_triton_backward = Launch("layer_norm_backward", "layer_norm", _launch_backward, _plain_backward, _fake_backward)


def _forward(
    x: Tensor, residual: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x + residual (x without a residual), mean and rstd [T]."""
    run = _triton_forward if backend(x) == "triton" else _plain_forward
    y, total, mean, rstd = run(x, residual, gamma, beta, eps)
    return y, x if residual is None else total, mean, rstd


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, s, mean, rstd = _forward(x, residual, gamma, beta, eps)
        ctx.save_for_backward(s, gamma, mean, rstd)
        ctx.added = residual is not None
        return y if residual is None else (y, s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, h: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, gamma, mean, rstd = ctx.saved_tensors
        run = _triton_backward if backend(x) == "triton" else _plain_backward
        dx = run(g, h, x, gamma, mean, rstd)
        return dx, dx if ctx.added else None, None, None, None


@overload
def layer_norm(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float = ..., residual: None = ...
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation of x, or of x + residual, over the last dimension; differentiable in x and residual.

    Args:
        x: [..., C], any strides.
        gamma, beta: [C], frozen, in x's dtype; None for a scale of one, a shift of zero.
        eps: added to the variance.
        residual: [..., C] to be added first, in x's dtype.

    Returns:
        y [..., C] in x's dtype; with a residual (y, x + residual).
    """
    if only_plain(x):
        s = x if residual is None else x + residual
        y = layer_norm_reference(s, gamma, beta, eps)
        return y if residual is None else (y, s)
    if torch.is_grad_enabled():
        return _LayerNorm.apply(x, residual, gamma, beta, eps)
    y, s, _, _ = _forward(x, residual, gamma, beta, eps)
    return y if residual is None else (y, s)
