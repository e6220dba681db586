"""Adapters in bf16 that still learn: the step is made in fp32 and rounded back at random, right on average.

A bf16 number has 8 bits; rounded to the nearest, an update under 1/512 of a weight is lost, and again each time. Here
the probability to round up is the part of the gap that lies below (Gupta et al. 2015): the expected weight is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def stochastic_round(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """x (fp32, finite) in bf16: one of its two neighbours, so that the mean over the generator's draws is x.

    A bf16 number is the upper half of an fp32 one. A uniform number of 16 bits is added to the lower half: the carry
    decides.
    """
    bits = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits += x.view(torch.int32)
    bits &= -(2**16)
    return bits.view(torch.float32).to(torch.bfloat16)


class RoundedOptimizer(torch.optim.Optimizer):
    """An optimizer of bf16 parameters whose state and step are those of fp32 ones.

    Gradients may be in fp32, as `FlatParameters` has them, or bf16. fp32 copies live in `step` alone, when no
    activations do: 4 bytes per parameter for a moment, and as many for a bf16 gradient. Random numbers come from the
    seed and the number of steps: the same in every process and after a resume, and independent of training's.

    Args:
        make: makes the optimizer that steps the fp32 copies.
        parameters: in bf16, on one device.
        seed: of the rounding.
    """

    def __init__(
        self,
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        parameters: Iterable[nn.Parameter],
        seed: int,
    ):
        self._narrow = list(parameters)
        self._wide = [nn.Parameter(parameter.detach().float()) for parameter in self._narrow]
        self._seed, self._steps = seed, 0
        self._inner = make(self._wide)
        super().__init__(self._narrow, {"lr": self._inner.param_groups[0]["lr"]})
        self.state = self._inner.state
        self._release()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step, from the gradients of the bf16 parameters."""
        assert closure is None, "the step is made once"
        learning = [(w, n, n.grad) for w, n in zip(self._wide, self._narrow, strict=True) if n.grad is not None]
        for wide, narrow, grad in learning:
            wide.data = narrow.detach().float()
            wide.grad = grad.float()
        self._inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self._inner.step()
        generator = torch.Generator(self._narrow[0].device)
        generator.manual_seed((self._seed * 2**31 + self._steps) % 2**63)
        for wide, narrow, _ in learning:
            narrow.copy_(stochastic_round(wide.detach(), generator))
        self._steps += 1
        self._release()

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self._inner.state_dict(), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._inner.load_state_dict(state_dict["inner"])
        self._steps = state_dict["steps"]
        self.state = self._inner.state

    def _release(self) -> None:
        for wide in self._wide:
            wide.data, wide.grad = wide.data.new_empty(0), None
