"""Muon: momentum whose matrices are made orthogonal (Jordan 2024, https://kellerjordan.github.io/posts/muon/).

`torch.optim.Muon` takes no convolutions and computes in bf16, which is slow on a CPU.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration, from the page above
ITERATIONS = 5
LEAST_SIDE = 24  # smaller matrices have too few directions to balance


def fits(parameter: Tensor) -> bool:
    """Whether Muon trains it: matrices and kernels of 2-D convolutions, [out, in, ...] with both sides large enough."""
    return parameter.ndim in (2, 4) and min(len(parameter), parameter[0].numel()) >= LEAST_SIDE


def orthogonal(matrix_MN: Tensor) -> Tensor:
    """Every singular value moved close to 1, by the Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = len(matrix_MN) > matrix_MN.shape[1]
    x = matrix_MN.T if tall else matrix_MN
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal and scaled to the size of AdamW's steps (Liu et al. 2025, arXiv 2502.16982,
    equation 4), so that both take the same learning rate and weight decay.

    Args:
        parameters: those that `fits` accepts.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group["lr"], group["weight_decay"], group["momentum"])

    def _step(self, parameter: Tensor, gradient: Tensor, lr: float, weight_decay: float, momentum: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - momentum)
        direction = orthogonal(gradient.lerp(state["momentum"], momentum).flatten(1))
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(direction.view(parameter.shape), alpha=-0.2 * lr * max(direction.shape) ** 0.5)
