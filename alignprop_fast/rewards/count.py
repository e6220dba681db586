"""Rewards from a detector's scores: how many objects of a kind are in the picture, or that there are none.

AlignProp (Prabhudesai et al., 2023, section 5) removes and counts objects with an open-vocabulary detector. A count of
boxes above a threshold has no gradient. Here we use a candidate's margin m_i = logit_i - logit(threshold) and the soft
"candidates i and j are one object" k_ij of `detectors.py` (k_ii = 1):

    a_i = sigmoid(m_i / t)                    soft "is there"; t = 0.5 if boxes may be duplicates, else 1
    w_i = a_i^4 / sum_j a_j^4 k_ij            share of candidate i in its object; 1 without duplicates
    n   = sum_i a_i w_i                       the soft count: each object counts once, by its best candidates

    count:KIND=N   score = N log(n / N) + N - n          Poisson log-likelihood of N minus its maximum: 0 at n = N
    remove:KIND    score = -log(1 + sum_i exp(m_i))      0 without any, about minus the best margin with one

Everything is smooth, without annealing. The gradient goes through the scores; the boxes have none. If no object is
seen, n is about exp(m), so `count` decreases with N m and its gradient does not vanish. The gradient of `remove` does
not vanish either, however sure the detector is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from alignprop_fast.rewards.detectors import load_detector
from alignprop_fast.rewards.weights import DEFAULT, RewardLoading

_TEMPERATURE = 0.5
_SHARPNESS = 4  # the power in the share: the best of several candidates gets nearly all


class Count(nn.Module):
    """`count:KIND=N`."""

    def __init__(self, argument: str, model: str | Path | None = None, loading: RewardLoading = DEFAULT) -> None:
        """argument: "KIND=N", for example "apple=3". model: as in `load_detector`.

        Raises FileNotFoundError, OSError or ValueError, one line each, for a bad argument or model.
        """
        super().__init__()
        kind, _, number = argument.rpartition("=")
        if not kind.strip() or not number.strip().isdecimal():
            raise ValueError(f"what to count must be written KIND=N, for example count:apple=3, not {argument!r}")
        self.number = int(number)
        self.detector = load_detector(model, kind.strip(), loading)

    def forward(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images_BCHW: [B, 3, H, W] in [0, 1]. Prompts play no part. Returns scores <= 0, fp32, [B], and soft_count."""
        log_count_B = log_soft_count(*self.detector.candidates(images_BCHW))
        count_B, wanted = log_count_B.exp(), self.number
        log_ratio_B = log_count_B - math.log(wanted) if wanted else 0.0
        return wanted * log_ratio_B + wanted - count_B, {"soft_count": count_B.detach()}


class Remove(nn.Module):
    """`remove:KIND`."""

    def __init__(self, kind: str, model: str | Path | None = None, loading: RewardLoading = DEFAULT) -> None:
        """kind: for example "apple". model: as in `load_detector`, with its errors."""
        super().__init__()
        self.detector = load_detector(model, kind.strip(), loading)

    def forward(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images_BCHW: [B, 3, H, W] in [0, 1]. Prompts play no part. Returns scores <= 0, fp32, [B], and soft_count."""
        margins_BQ, log_same_BQQ = self.detector.candidates(images_BCHW)
        count_B = log_soft_count(margins_BQ.detach(), log_same_BQQ).exp()
        return -F.softplus(margins_BQ.logsumexp(1)), {"soft_count": count_B}


def log_soft_count(margins_BQ: Tensor, log_same_BQQ: Tensor | None) -> Tensor:
    """log n of the module's formula, [B]. log_same_BQQ: log k_ij; None if no two candidates can be one object."""
    if log_same_BQQ is None:
        return F.logsigmoid(margins_BQ).logsumexp(1)
    log_there_BQ = F.logsigmoid(margins_BQ / _TEMPERATURE)
    log_total_BQ = (_SHARPNESS * log_there_BQ[:, None] + log_same_BQQ).logsumexp(-1)
    return (log_there_BQ + _SHARPNESS * log_there_BQ - log_total_BQ).logsumexp(1)
