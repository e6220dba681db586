"""How far the leaps of a surrogate land from the chain."""

import torch

from alignprop_fast.sampling.gates import Truncation


class Leaps:
    """The errors of a truncation's leaps, seen while the chain runs, without gradient.

    A surrogate is trusted less where its leaps miss the chain (LeapAlign). As losses are sums over samples, dividing
    the gradient of each sample is dividing its loss.
    """

    def __init__(self, truncation: Truncation) -> None:
        self.leaps, self.least = truncation.leaps, truncation.least_error
        self._ends: dict[int, torch.Tensor] = {}
        self.error: torch.Tensor | None = None  # [B], the sum over the leaps that have landed

    def see(self, i: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Step i has the latents x and the guided prediction y, [B, ...] each."""
        for leap in self.leaps:
            if i == leap.start:
                self._ends[leap.target] = leap.x_factor * x
            factor = dict(leap.y_factors).get(i)
            if factor is not None:
                self._ends[leap.target] = self._ends[leap.target] + factor * y

    def land(self, target: int, x: torch.Tensor) -> None:
        """The chain has reached the latents x before step `target`, or its end."""
        end = self._ends.pop(target, None)
        if end is not None:
            error = (end.float() - x.float()).abs().flatten(1).mean(1).clamp_min(self.least)
            self.error = error if self.error is None else self.error + error

    def divided(self, g: torch.Tensor) -> torch.Tensor:
        """The gradient [B, ...] of each sample divided by its error."""
        assert self.error is not None, "the chain has not run"
        return (g / self.error.view(-1, *[1] * (g.ndim - 1))).to(g.dtype)
