"""Running normalisation of a mixture, so that weights are comparable between parts of different scales.

With running mean m and variance v of each part's scores over training, the gradient is that of

    sum over parts of  weight * (score - m) / sqrt(v)

m and v are treated as constants. They are averages over the batches so far, weighted by DECAY per batch of age:
E[f] = sum_j DECAY^(n-j) mean(f of batch j) / sum_j DECAY^(n-j), m = E[s], v = E[s^2] - m^2. The first batch uses its
own m and v.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignprop_fast.rewards.mixture import Part, WeightedSum

DECAY = 0.98  # per batch; about the last fifty batches count
_SMALLEST_SHARE = 1e-6  # of the mean: a smaller standard deviation is rounding
_Moments = tuple[float, float, float]  # sums of weights, of mean scores, of mean squares


class NormalisedSum(WeightedSum):
    """A weighted sum with the gradient of its normalised parts.

    The scores keep the value of the plain weighted sum, so that curves are comparable over a run. (m only shifts the
    level and has no gradient.) A call changes nothing, so it may be repeated or split into chunks. The trainer passes
    the scores of each batch to `observe`. A part is not scaled while all its scores have been equal, for example after
    a single score.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(parts)
        self.observes = True
        self._moments: dict[str, _Moments] = {}

    def observe(self, info: Mapping[str, Any]) -> None:
        """Take note of a batch: {part name: its scores [B]}. One that is not finite leaves no trace."""
        super().observe(info)
        for part in self.parts:
            new = _moments(info[part.name])
            if math.isfinite(new[2]):
                old = self._moments.get(part.name, (0.0, 0.0, 0.0))
                self._moments[part.name] = tuple(DECAY * a + b for a, b in zip(old, new, strict=True))  # type: ignore[assignment]

    def _weighted(self, part: Part, scores_B: Tensor) -> Tensor:
        plain_B = super()._weighted(part, scores_B)
        if not (torch.is_grad_enabled() and scores_B.requires_grad):
            return plain_B
        scaled_B = plain_B / _deviation(self._moments.get(part.name) or _moments(scores_B))
        return plain_B.detach() + (scaled_B - scaled_B.detach())

    def state_dict(self) -> dict[str, Any]:
        return {name: list(moments) for name, moments in self._moments.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._moments = {name: (moments[0], moments[1], moments[2]) for name, moments in state.items()}


def _moments(scores_B: Tensor) -> _Moments:
    scores_B = scores_B.detach().double()
    return 1.0, scores_B.mean().item(), scores_B.square().mean().item()


def _deviation(moments: _Moments) -> float:
    """The standard deviation; 1 if it is zero or not finite."""
    weights, scores, squares = moments
    mean = scores / weights
    deviation = math.sqrt(max(squares / weights - mean**2, 0.0)) if math.isfinite(squares) else 0.0
    return deviation if deviation > _SMALLEST_SHARE * abs(mean) else 1.0
