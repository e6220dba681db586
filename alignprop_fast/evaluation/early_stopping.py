"""Early stopping by a second score that is watched but not trained for.

Training raises its own reward to the end, even when the pictures become worse. Gao et al. 2022, "Scaling Laws for
Reward Model Overoptimization": a score that is not trained for first rises and then falls, while the trained one still
rises. The adapters from before this fall are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch


class Stateful(Protocol):
    """An object that a checkpoint saves beside the trainer's state.

    Its state holds numbers, texts, tensors, lists and dictionaries.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class EarlyStopping:
    """Keeps the parameters of the last evaluation whose score was within `max_drop` of the best so far.

    `stop` becomes true after `patience` evaluations in a row below that.

    Raises:
        ValueError: the patience is below 1 or the drop below 0.
    """

    def __init__(self, patience: int, max_drop: float = 0.0):
        if patience < 1:
            raise ValueError(f"patience is {patience}: use at least 1 evaluation")
        if not 0 <= max_drop < math.inf:
            raise ValueError(f"max_drop is {max_drop}: use 0 or more, in units of the watched score")
        self.patience, self.max_drop = patience, max_drop
        self.best, self.bad_in_a_row, self.kept_step = -math.inf, 0, 0
        self._kept: list[torch.Tensor] = []

    @property
    def stop(self) -> bool:
        return self.bad_in_a_row >= self.patience

    def update(self, step: int, score: float, parameters: Iterable[torch.Tensor]) -> None:
        """Record an evaluation after `step` optimizer steps. NaN counts as a fall."""
        if score >= self.best - self.max_drop:
            self.bad_in_a_row, self.kept_step = 0, step
            self._kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        else:
            self.bad_in_a_row += 1
        self.best = max(self.best, score) if math.isfinite(score) else self.best

    def restore(self, parameters: Sequence[torch.Tensor]) -> None:
        """Set the parameters to the kept values; without any, leave them unchanged."""
        if self._kept:
            with torch.no_grad():
                for parameter, value in zip(parameters, self._kept, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        names = ("best", "bad_in_a_row", "kept_step")
        return {**{name: getattr(self, name) for name in names}, "kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.bad_in_a_row, self.kept_step = state["best"], state["bad_in_a_row"], state["kept_step"]
        self._kept = list(state["kept"])
