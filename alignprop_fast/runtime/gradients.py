"""The gradients of one step, in the width in which a chain adds them up."""

from collections.abc import Sequence

import torch


def step_gradients(y: torch.Tensor, wanted: Sequence[torch.Tensor], gy: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients of the wanted tensors in fp32 or wider, from the gradient gy of y; None for those that y lacks.

    Those in 16 bits are widened together in one call: there are a thousand of them, all small.
    """
    found: list[torch.Tensor | None] = [*torch.autograd.grad(y, wanted, gy, allow_unused=True)]
    narrow = [k for k, grad in enumerate(found) if grad is not None and grad.dtype.itemsize < 4]
    grads = [grad for k in narrow if (grad := found[k]) is not None]
    if grads:
        flat = grads[0].new_empty(sum(grad.numel() for grad in grads), dtype=torch.float32)
        pieces = flat.split([grad.numel() for grad in grads])
        wide = [piece.view(grad.shape) for piece, grad in zip(pieces, grads, strict=True)]
        torch._foreach_copy_(wide, grads)
        for k, grad in zip(narrow, wide, strict=True):
            found[k] = grad
    return found
