"""What runs again in the backward pass must read what it read at first, or the gradient is that of another run.

Autograd checks the tensors that it saved. A replay reads tensors that were not saved, so they are checked here.
"""

from collections.abc import Callable, Hashable
from functools import partial

import torch

CHANGED = (
    "weights, adapter settings or embeddings were changed between sampling and the backward pass, which would be that "
    "of another run: call backward() first, or sample again"
)


def raise_if_changed(x: torch.Tensor, state: Callable[[], Hashable]) -> torch.Tensor:
    """x, whose backward pass raises RuntimeError if `state()` is no longer what it is now."""
    if x.requires_grad:
        x.register_hook(partial(_check, state, state()))
    return x


def _check(state: Callable[[], Hashable], before: Hashable, g: torch.Tensor) -> None:
    if state() != before:
        raise RuntimeError(CHANGED)
