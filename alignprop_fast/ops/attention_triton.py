"""The package's attention kernels, imported at their first call: Triton may be missing."""

import torch

Tensor = torch.Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(o [B, H, M, D], lse [B, H, M]) of q [B, H, M, D] and k, v [B, H, N, D]; lengths: valid keys [B]."""
    from alignprop_fast.kernels import attention as kernels

    return kernels.attention_forward(q, k, v, scale, lengths)


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient g of o [B, H, M, D]."""
    from alignprop_fast.kernels import attention as kernels

    return kernels.attention_backward(g, q, k, v, o, lse, scale, lengths)
