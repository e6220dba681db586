"""What is run again in the backward pass must read what it read at first: tensors are compared by autograd's count of
changes in place, which autograd itself compares for the tensors that it saved, and by their places."""

from collections.abc import Callable, Hashable, Iterable
from functools import partial

import torch
from torch import nn

CHANGED = (
    "weights, adapter settings or embeddings were changed between sampling and the backward pass, which would be that "
    "of another run: call backward() first, or sample again"
)


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place, as autograd counts it; of inference tensors it does not."""
    return 0 if tensor.is_inference() else tensor._version


def versions(modules: Iterable[nn.Module]) -> Hashable:
    """To compare: changes where a parameter or buffer is changed in place or replaced.

    Of frozen weights the place does not count: they may wait elsewhere while the text encoders run.
    """
    held = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return tuple((id(t), version(t), t.data_ptr() if t.requires_grad else 0) for t in held)


def raise_if_changed(x: torch.Tensor, state: Callable[[], Hashable]) -> torch.Tensor:
    """x, whose backward pass raises RuntimeError where `state()` is no longer what it is now."""
    if x.requires_grad:
        x.register_hook(partial(_check, state, state()))
    return x


def _check(state: Callable[[], Hashable], before: Hashable, g: torch.Tensor) -> None:
    if state() != before:
        raise RuntimeError(CHANGED)
