"""The scheduler's updates under classifier-free guidance: which steps are guided, and where the two branches meet."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from alignprop_fast.generate.guidance import Guidance, Scale
from alignprop_fast.models.conditioning import Conditioning
from alignprop_fast.sampling import StepTable, Update


class GuidedUpdates:
    """The updates of a table's steps.

    Args:
        scale: of the guidance; a tensor if it learns.
        branches: of a prediction: 2 without and with the prompt, or 1.

    Attributes:
        plain: of a prediction of one branch. The state has the same form in all of them.
        combines: whether `guided` blends the two branches. The update does it instead where guidance is linear in them
            and its scale does not learn.
    """

    def __init__(self, table: StepTable, guidance: Guidance, scale: Scale, branches: int):
        self.guidance, self.scale = guidance, scale
        self.plain = self._guided = Update(table, (1.0,))
        self.combines = branches == 2
        if branches == 2 and guidance.is_linear and not isinstance(scale, torch.Tensor):
            self.combines, self._guided = False, Update(table, (1 - scale, scale))
        self._skips = [branches == 2 and not guidance.reaches(timestep) for timestep in table.timesteps]

    @property
    def kind(self) -> Hashable:
        """What `guided` depends on besides its arguments."""
        return self.scale, self.guidance, self.combines

    def cond(self, i: int, cond: Conditioning) -> Conditioning:
        """What step i needs of the conditioning: that with the prompt alone if the step is not guided."""
        return cond.of_prompts() if self._skips[i] else cond

    def guided(self, i: int, y: torch.Tensor) -> torch.Tensor:
        """The denoiser's output y at step i, its branches blended if the update does not do it."""
        return self.guidance.guided(y, self.scale) if self.combines and not self._skips[i] else y

    def at(self, i: int) -> Update:
        """The update of step i, of what `guided` returns."""
        return self.plain if self._skips[i] else self._guided
