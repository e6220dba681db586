"""attention: o = softmax(s q k^T) v (Vaswani et al. 2017, eq. 1); keeps q, k, v, o and the logsumexp.

A recomputed segment reuses o and the logsumexp (`ops.reuse`). The backward pass computes the probabilities from them
(Dao et al. 2022). So the quadratic part of attention never runs forward twice.

Keys can end in padding, of another length for each batch element. Padding between two parts of a sequence needs no
mask of its own: attention does not depend on the order of keys, so the padded part can come last.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alignprop_fast.ops import attention_backends as backends
from alignprop_fast.ops.attention_plain import is_key
from alignprop_fast.ops.backend import Function
from alignprop_fast.ops.qk_norm_rope import Form, Part, form_of, gradients, prepared, tensors_of
from alignprop_fast.ops.reuse import reuse_or_compute

Tensor = torch.Tensor


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Plain PyTorch. q: [B, H, M, D]; k, v: [B, H, N, D]; lengths: valid keys [B]; returns [B, H, M, D]."""
    mask = None if lengths is None else is_key(lengths, k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, padding: Tensor | None) -> tuple[Tensor, ...]:
    """(o, lse) by the chosen implementation, or by plain PyTorch if it fails."""
    run = backends.chosen("forward", q, k, padding)
    return run(q, k, v, scale) if padding is None else run(q, k, v, scale, padding)


def _backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, padding: Tensor | None
) -> tuple[Tensor, ...]:
    """(dq, dk, dv) by the chosen implementation, or by plain PyTorch if it fails."""
    run = backends.chosen("backward", q, k, padding)
    return run(g, q, k, v, o, lse, scale) if padding is None else run(g, q, k, v, o, lse, scale, padding)


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: Tensor | None) -> Tensor:
        o, lse = reuse_or_compute("attention", _forward, q, k, v, scale, lengths)
        ctx.save_for_backward(q, k, v, o, lse, lengths)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, lengths = ctx.saved_tensors
        return *_backward(g, q, k, v, o, lse, ctx.scale, lengths), None, None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, lengths: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v, differentiable in all three.

    Args:
        q: [B, H, M, D]; k, v: [B, H, N, D]; any strides. They are copied if the last dimension is not contiguous.
        scale: None means D ** -0.5.
        lengths: valid keys of each batch element, 1 to N, [B] in int32 on the device; the others are padding. None: N.

    Returns:
        [B, H, M, D] in q's dtype.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:  # the kernels of libraries give garbage
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if torch.is_grad_enabled():
        return _Attention.apply(q, k, v, scale, lengths)
    return _forward(q, k, v, scale, lengths)[0]


class _AttentionOfParts(Function):
    """Keeps the projections instead of q, k and v, which are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, form: Form, scale: float, padding: Tensor | None, *tensors: Tensor) -> Tensor:
        o, lse = reuse_or_compute("attention", _forward_of_parts, form, scale, padding, tensors)
        ctx.save_for_backward(o, lse, padding, *tensors)
        ctx.form, ctx.scale = form, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        o, lse, padding, *tensors = ctx.saved_tensors
        q, k, v = prepared(ctx.form, tensors)
        grads = _backward(g, *_heads_first(q, k, v), o, lse, ctx.scale, padding)
        dq, dk, dv = (_shared_by(x, t.shape[2]).transpose(1, 2) for x, t in zip(grads, (q, k, v), strict=True))
        return None, None, None, *gradients(ctx.form, tensors, dq, dk, dv)


def _forward_of_parts(
    form: Form, scale: float, padding: Tensor | None, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    return _forward(*_heads_first(*prepared(form, tensors)), scale, padding)


def _heads_first(q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, S, D] each. Keys and values that several heads of q share are repeated for each of them."""
    sharing = q_BSHD.shape[2] // k_BSGD.shape[2]
    if sharing > 1:
        k_BSGD, v_BSGD = (x.repeat_interleave(sharing, dim=2) for x in (k_BSGD, v_BSGD))
    return q_BSHD.transpose(1, 2), k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2)


def _shared_by(g_BHSD: Tensor, heads: int) -> Tensor:
    """The gradient of that many heads, from those of all heads that share them."""
    return g_BHSD if g_BHSD.shape[1] == heads else g_BHSD.unflatten(1, (heads, -1)).sum(2)


def attention_of_parts(
    parts: Sequence[Part],
    head_dim: int,
    eps: float,
    halved: bool = False,
    lengths: Tensor | None = None,
    marks: Tensor | None = None,
) -> Tensor:
    """Attention over a sequence that consists of these parts, with `qk_norm_rope` before it, differentiable in both.

    It keeps the projections, o and the logsumexp. The logits are scaled by D ** -0.5.

    Args:
        parts, head_dim, eps, halved: as for `qk_norm_rope`.
        lengths: as for `attention`, counted over the whole sequence.
        marks: ones and zeros [B, S] instead of lengths. The logit of query i and key j gets marks_i marks_j added, so
            that marked tokens see less of the others, as in diffusers' Chroma.

    Returns:
        [B, S, H D] in the projections' dtype.

    Raises:
        ValueError: as `qk_norm_rope`.
    """
    padding = lengths if marks is None else marks
    form, tensors, scale = form_of(parts, head_dim, eps, halved), tensors_of(parts), head_dim**-0.5
    if torch.is_grad_enabled():
        o_BHSD = _AttentionOfParts.apply(form, scale, padding, *tensors)
    else:
        o_BHSD = _forward_of_parts(form, scale, padding, tensors)[0]
    return o_BHSD.transpose(1, 2).flatten(2)
