"""attention: o = softmax(s q k^T) v, without mask (Vaswani et al. 2017, eq. 1); keeps q, k, v, o and the logsumexp.

A recomputed segment reuses o and the logsumexp (`ops.reuse`). The backward pass computes the probabilities from them
(Dao et al. 2022). So the quadratic part of attention never runs forward twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alignprop_fast.ops import attention_backends as backends
from alignprop_fast.ops.backend import Function, attempt, is_traced
from alignprop_fast.ops.reuse import reuse_or_compute


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Plain PyTorch. q: [B, H, M, D]; k, v: [B, H, N, D]; mask: True for keys to read; returns [B, H, M, D]."""
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, ...]:
    """(o, lse) by the chosen implementation, or by plain PyTorch if it fails."""
    chosen, arguments = backends.choose("forward", q, k), (q, k, v, scale)
    if is_traced(q):
        return chosen.forward(*arguments)
    return attempt(f"attention.{chosen.name}.forward", chosen.forward, backends.PLAIN.forward, *arguments)


def _backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) by the chosen implementation, or by plain PyTorch if it fails."""
    chosen, arguments = backends.choose("backward", q, k), (g, q, k, v, o, lse, scale)
    if is_traced(q):
        return chosen.backward(*arguments)
    return attempt(f"attention.{chosen.name}.backward", chosen.backward, backends.PLAIN.backward, *arguments)


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        o, lse = reuse_or_compute("attention", lambda: _forward(q, k, v, scale))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        return *_backward(g, q, k, v, o, lse, ctx.scale), None


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """softmax(scale q k^T) v, differentiable in all three.

    Args:
        q: [B, H, M, D]; k, v: [B, H, N, D]; any strides with a contiguous last dimension.
        scale: None means D ** -0.5.

    Returns:
        [B, H, M, D] in q's dtype.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(q, k, v, scale) if torch.is_grad_enabled() else _forward(q, k, v, scale)[0]
