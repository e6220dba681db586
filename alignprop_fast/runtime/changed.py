"""A replay must read the same values as the first run, or the gradient is wrong.

Autograd checks the tensors that it saved. A replay also reads tensors that were not saved; this module checks those.
"""

from collections.abc import Callable, Hashable
from functools import partial

import torch

CHANGED = (
    "weights, adapter settings or embeddings were changed between sampling and the backward pass, so its gradient "
    "would be wrong: call backward() first, or sample again"
)


def raise_if_changed(x: torch.Tensor, state: Callable[[], Hashable]) -> torch.Tensor:
    """x, whose backward pass raises RuntimeError if `state()` has changed by then."""
    if x.requires_grad:
        x.register_hook(partial(_check, state, state()))
    return x


def _check(state: Callable[[], Hashable], before: Hashable, g: torch.Tensor) -> None:
    if state() != before:
        raise RuntimeError(CHANGED)
