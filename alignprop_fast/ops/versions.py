"""Detects changed tensors, by autograd's count of changes in place and by their memory address."""

from collections.abc import Hashable, Iterable

import torch
from torch import nn


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place, as autograd counts it; 0 for inference tensors, which have no count."""
    return 0 if tensor.is_inference() else tensor._version


def versions(modules: Iterable[nn.Module]) -> Hashable:
    """A value that differs after a parameter or buffer was changed in place or replaced.

    The address of a frozen weight does not count, because it may move while the text encoders run.
    """
    held = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return tuple((id(t), version(t), t.data_ptr() if t.requires_grad else 0) for t in held)
