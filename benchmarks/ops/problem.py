"""What an op bench declares: shapes of models, and a `Problem` of each with the implementations to compare."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Tensor = torch.Tensor
Implementation = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """One shape of a model: the sizes after the batch dimension, and the rows of the batch per image."""

    model: str
    sizes: tuple[int, ...]
    rows: int = 2  # a pair under classifier-free guidance
    check_sizes: tuple[int, ...] | None = None  # smaller sizes, if float64 at full size would not fit


@dataclass(frozen=True)
class Work:
    """The work that the algorithm cannot avoid: bytes to and from memory, and FLOP of matrix products."""

    moved_bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Problem:
    """One op at one shape. Implementations take `inputs`; "ours" and "eager" (the reference) must be among them."""

    inputs: tuple[Tensor, ...]
    learning: int  # number of leading inputs that get gradients; 0: the op has no backward pass
    implementations: dict[str, Implementation]
    forward: Work
    backward: Work = field(default_factory=Work)
    own_inputs: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)  # for peers that take another form

    def inputs_of(self, name: str) -> tuple[Tensor, ...]:
        """The inputs of this implementation; the first `learning` of them get gradients."""
        return self.own_inputs.get(name, self.inputs)


Make = Callable[..., Problem]
"""make(batch, *sizes, dtype=..., device=...)"""


def optional(module: str) -> Any:
    """The module, or None if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def randn(*shape: int, like: tuple[torch.dtype, torch.device], scale: float = 1.0) -> Tensor:
    """Normal numbers from the global generator. like: (dtype, device)."""
    return torch.randn(*shape, dtype=torch.float32, device=like[1]).mul_(scale).to(like[0])
