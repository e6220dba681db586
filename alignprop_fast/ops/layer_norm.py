"""layer_norm: normalisation over the last dimension with a frozen affine map, y = gamma xhat + beta (Ba et al. 2016).

`norm_modulate` computes it: it keeps x, like stock PyTorch, but never makes gradients of gamma and beta. The addition
of a residual branch runs in the same pass, forward and backward.
"""

from typing import overload

import torch
import torch.nn.functional as F

from alignprop_fast.ops.norm_modulate import norm_modulate

Tensor = torch.Tensor


def layer_norm_reference(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """Plain PyTorch. x: [..., C]; gamma, beta: [C] or None."""
    return F.layer_norm(x, x.shape[-1:], gamma, beta, eps)


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
    return norm_modulate(x, None, beta, gamma, eps, branch=residual)
