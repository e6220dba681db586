"""Running normalisation of a mixture: parts of different scales pull with the strength that their weights say.

With running mean m and variance v of each part's scores over training, the gradient is that of

    sum over parts of  weight * (score - m) / sqrt(v)

m and v count as constants. They are averages over batches with weights that fall by DECAY from batch to batch, the
present one included: E[f] = sum_j DECAY^(n-j) mean(f of batch j) / sum_j DECAY^(n-j), m = E[s], v = E[s^2] - m^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .mixture import Part, WeightedSum

DECAY = 0.98  # batches; the last fifty or so count
_SMALLEST_SHARE = 1e-6  # of the mean: a standard deviation below is rounding


class NormalisedSum(WeightedSum):
    """A weighted sum with the gradient of its normalised parts.

    The scores keep the value of the plain weighted sum, so that curves compare over a run (m shifts the level alone and
    has no gradient). Statistics are taken where the images carry gradient; elsewhere this is `WeightedSum`. A part
    whose scores have all been alike so far, such as a single one, is not scaled.

    In a run of several processes each normalises by its own images.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(parts)
        self._moments: dict[str, tuple[float, ...]] = {
            part.name: (0.0, 0.0, 0.0) for part in parts
        }  # sums of weights, scores, squares

    def deviation(self, name: str) -> float:
        """Running standard deviation of a part's scores; 1 where it is zero or nothing has been seen."""
        weights, scores, squares = self._moments[name]
        if not weights:
            return 1.0
        mean = scores / weights
        deviation = math.sqrt(max(squares / weights - mean**2, 0.0))
        return deviation if deviation > _SMALLEST_SHARE * abs(mean) else 1.0

    def _weighted(self, part: Part, scores_B: Tensor) -> Tensor:
        plain_B = super()._weighted(part, scores_B)
        if not (torch.is_grad_enabled() and scores_B.requires_grad):
            return plain_B
        self._update(part.name, scores_B.detach().double())
        scaled_B = plain_B / self.deviation(part.name)
        return plain_B.detach() + (scaled_B - scaled_B.detach())

    def _update(self, name: str, scores_B: Tensor) -> None:
        mean, square = scores_B.mean().item(), scores_B.square().mean().item()
        if math.isfinite(square):  # a batch that is not finite is skipped by the trainer, and must leave no trace
            new = (1.0, mean, square)
            self._moments[name] = tuple(DECAY * old + one for old, one in zip(self._moments[name], new, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {name: list(moments) for name, moments in self._moments.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Statistics of parts that are in both; a part that is new begins anew."""
        self._moments |= {name: tuple(moments) for name, moments in state.items() if name in self._moments}
