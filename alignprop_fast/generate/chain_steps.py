"""The denoising steps that a sampler's calls run: all of its table or a part, with gates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from alignprop_fast.sampling import Gate, StepTable, Truncation, checked, draw_truncation


class ChainSteps:
    """The steps of a table, for calls with or without a truncation."""

    def __init__(self, table: StepTable):
        self.table = table
        self._timesteps: dict[tuple[float, ...], torch.Tensor] = {}

    def truncation(
        self, given: Truncation | Sequence[Gate] | str | None, grad_steps: Iterable[int] | None
    ) -> Truncation:
        """From a call's arguments; all steps carry gradient if both are None.

        Raises:
            ValueError: both are given, the rule is unknown, or the gates do not fit the chain.
        """
        if given is None:
            given = Truncation.at(range(len(self.table)) if grad_steps is None else grad_steps)
        elif grad_steps is not None:
            raise ValueError("grad_steps and truncation both set which steps carry gradient: give one of them")
        if isinstance(given, str):
            given = draw_truncation(given, self.table)
        truncation = given if isinstance(given, Truncation) else Truncation(tuple(given))
        return replace(truncation, gates=checked(truncation.gates, len(self.run_under(truncation))))

    def run_under(self, truncation: Truncation) -> StepTable:
        """The table of the steps that the chain runs."""
        return self.table if truncation.last_step is None else self.table.ending_at(truncation.last_step)

    def timesteps(self, table: StepTable, device: torch.device) -> torch.Tensor:
        """The table's timesteps on the device, copied there once because each copy waits for the device."""
        known = self._timesteps.get(table.timesteps)
        if known is None or known.device != device:
            known = self._timesteps[table.timesteps] = torch.tensor(table.timesteps, device=device)
        return known
