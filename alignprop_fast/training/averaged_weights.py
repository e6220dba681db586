"""An exponential moving average of the trained weights (Polyak and Juditsky 1992), by diffusers' `EMAModel`.

The average varies less from step to step than the weights do. It is held in fp32 also where adapters are bf16, whose
8 bits would lose its small changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class AveragedWeights:
    """The average of what an optimizer steps: 4 bytes for each number, where the tensors lie.

    The decay in update n is min(decay, n / (9 + n)), and 0 in the first one: a short run does not average its start.

    Args:
        tensors: as the optimizer sees them, see `FlatParameters`.
        decay: at least 0, below 1.
    """

    def __init__(self, tensors: Sequence[nn.Parameter], decay: float):
        self._tensors, self._decay = list(tensors), decay
        self.restart()

    def restart(self) -> None:
        """Begin anew with the present weights."""
        self._model = EMAModel(self._tensors, decay=self._decay)
        self._model.to(dtype=torch.float32)

    def update(self) -> None:
        """Take in the weights after an optimizer step. Needs twice its own bytes for a moment."""
        self._model.step(self._tensors)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the tensors hold the average, rounded to their dtype; their own values wait on the host.

        A block inside another one changes nothing.
        """
        if self._model.temp_stored_params is not None:
            yield
            return
        self._model.store(self._tensors)
        self._model.copy_to(self._tensors)
        try:
            yield
        finally:
            self._model.restore(self._tensors)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._model.optimization_step, "weights": self._model.shadow_params}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._model.optimization_step = state["updates"]
        for own, saved in zip(self._model.shadow_params, state["weights"], strict=True):
            own.copy_(saved)
