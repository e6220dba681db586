"""The package's attention kernels, imported at their first call: Triton may be missing."""

from functools import cache
from types import ModuleType

import torch

Tensor = torch.Tensor


@cache
def _kernels() -> ModuleType:
    from alignprop_fast.kernels import attention

    return attention


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(o [B, H, M, D], lse [B, H, M]) of q [B, H, M, D] and k, v [B, H, N, D]; lengths: valid keys [B]."""
    return _kernels().attention_forward(q, k, v, scale, lengths)


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient g of o [B, H, M, D]."""
    return _kernels().attention_backward(g, q, k, v, o, lse, scale, lengths)
