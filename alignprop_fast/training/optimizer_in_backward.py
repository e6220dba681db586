"""Full fine-tuning with the optimizer's step inside the backward pass (Lv et al. 2023): no gradient outlives its use.

A chain's gradient is a sum over its gradient steps, whole only when the last replay (the earliest step) adds its term.
So the sums are made in place in the parameters' `.grad`, and in that last replay each parameter is stepped as soon as
its own is complete, and its gradient freed. Of the parameters' size P in fp32 the gradients take P at the peak where
several steps carry gradient (2 P without this: the sums, and the last term of all parameters), and almost nothing
where one does (P without).

The norm of all gradients together is known only when all of them are gone, so each tensor is clipped by its own norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class OptimizerInBackward(torch.optim.Optimizer):
    """One optimizer for each parameter, stepped from within `backward`.

    Args:
        make: makes the optimizer of a list of parameters; it must treat tensors separately (Prodigy does not).
        parameters: the whole model's, in fp32.
        max_norm: each tensor's gradient is clipped to it; one that is not finite becomes zero.

    Attributes:
        final: set it before the backward pass that completes the sums, and clear it before others.
    """

    def __init__(
        self,
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        parameters: Iterable[nn.Parameter],
        max_norm: float,
    ):
        self._parameters = list(parameters)
        self._optimizers = {parameter: make([parameter]) for parameter in self._parameters}
        super().__init__(self._parameters, {"lr": self._optimizers[self._parameters[0]].param_groups[0]["lr"]})
        self._max_norm, self._norms = max_norm, list[torch.Tensor]()
        self.final = self._closing = False
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def receive(self, x: torch.Tensor, y: torch.Tensor, gy: torch.Tensor, last: bool) -> torch.Tensor | None:
        """The chain's sink: adds one step's gradients to the sums; returns that of its input x, if x wants one.

        y: the step's output, gy: its gradient; last: no earlier step of the chain follows.
        """
        self._closing = self.final and last
        torch.autograd.backward(y, gy, inputs=[*self._parameters, x] if x.requires_grad else self._parameters)
        self._closing = False
        gx, x.grad = x.grad, None
        return gx

    def finish(self) -> float:
        """Step what still waits (the last chain had no gradient step); returns the norm of all, before clipping."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                self._step(parameter)
        norms, self._norms = self._norms, []
        return float(torch.stack(norms).norm()) if norms else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"each": [optimizer.state_dict() for optimizer in self._optimizers.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self._optimizers.values(), state_dict["each"], strict=True):
            optimizer.load_state_dict(state)

    def _arrived(self, parameter: torch.Tensor) -> None:
        if self._closing:
            self._step(parameter)

    @torch.no_grad()
    def _step(self, parameter: torch.Tensor) -> None:
        grad = parameter.grad
        assert grad is not None
        norm = grad.norm()
        self._norms.append(norm)
        # All on the device: to wait for it at each of a thousand tensors would hold up the backward pass.
        scale = torch.where(norm.isfinite(), (self._max_norm / (norm + 1e-6)).clamp(max=1.0), 0.0)
        grad.nan_to_num_(0.0, 0.0, 0.0).mul_(scale)
        optimizer = self._optimizers[parameter]  # type: ignore[index]
        optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        optimizer.step()
        parameter.grad = None
