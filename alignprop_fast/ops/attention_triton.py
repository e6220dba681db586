"""The package's attention kernels as custom operators, so that tracing and fake tensors work with them."""

import torch

Tensor = torch.Tensor


def _like_rows(t: Tensor) -> Tensor:
    """Uninitialised [B, H, M, D] over [B, M, H, D] memory."""
    b, h, m, d = t.shape
    return t.new_empty(b, m, h, d).transpose(1, 2)


@torch.library.custom_op("alignprop_fast::attention_forward", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(o [B, H, M, D], lse [B, H, M]) of q [B, H, M, D] and k, v [B, H, N, D]."""
    from alignprop_fast.kernels import attention as kernels

    return kernels.attention_forward(q, k, v, scale)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _like_rows(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("alignprop_fast::attention_backward", mutates_args=())
def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient g of o [B, H, M, D]."""
    from alignprop_fast.kernels import attention as kernels

    return kernels.attention_backward(g, q, k, v, o, lse, scale)


@backward.register_fake
def _(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_rows(q), _like_rows(k), _like_rows(v)
