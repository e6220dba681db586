"""Whether tensors have changed: by autograd's count of changes in place, and by where they lie."""

from collections.abc import Hashable, Iterable

import torch
from torch import nn


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place, as autograd counts it. It does not count for inference tensors: 0."""
    return 0 if tensor.is_inference() else tensor._version


def versions(modules: Iterable[nn.Module]) -> Hashable:
    """To compare: changes where a parameter or buffer is changed in place or replaced.

    The place of a frozen weight does not count: it may wait elsewhere while the text encoders run.
    """
    held = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return tuple((id(t), version(t), t.data_ptr() if t.requires_grad else 0) for t in held)
