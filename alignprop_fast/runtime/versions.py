"""What is run again in the backward pass must read what it read at first: tensors are compared by autograd's count of
changes in place, which autograd itself compares for the tensors that it saved, and by their places."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

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


def unchanged(x: torch.Tensor, state: Callable[[], Hashable]) -> torch.Tensor:
    """x, whose backward pass raises RuntimeError where `state()` is no longer what it is now."""
    return _Unchanged.apply(x, state) if x.requires_grad else x


class _Unchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, state: Callable[[], Hashable]) -> torch.Tensor:
        ctx.state, ctx.before = state, state()
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.state() != ctx.before:
            raise RuntimeError(CHANGED)
        return g, None
