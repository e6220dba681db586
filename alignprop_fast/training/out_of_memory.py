"""When the device runs out of memory in spite of a plan: make the plan leaner, and repeat the work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.ops.errors import OutOfMemory, unless_out_of_memory
from alignprop_fast.planner import BudgetInfeasible, format_bytes
from alignprop_fast.training.checkpoint import rng_state, set_rng_state

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def with_less_memory(sampler: DifferentiableSampler, work: Callable[[], Result]) -> Result:
    """work(), again with the same random numbers and a leaner plan each time that it runs out of memory.

    For work that adds to gradients at its very end, as a chain does: what failed has added nothing. The sampler keeps
    the leaner plan, since the cause may last: memory in pieces, or taken by another process.

    Raises:
        torch.OutOfMemoryError: there is no leaner plan; the message names what to change.
    """
    while True:
        state = rng_state()
        result = unless_out_of_memory(work)
        if not isinstance(result, OutOfMemory):
            return result
        set_rng_state(state)
        _tighten(sampler, result.reason)


def _tighten(sampler: DifferentiableSampler, reason: str) -> None:
    try:
        budget_bytes = sampler.tighten()
    except BudgetInfeasible as error:
        remedies = " or ".join(error.remedies)
        raise torch.OutOfMemoryError(f"{reason}; there is no leaner plan: use {remedies}") from None
    logger.warning("out of memory: from here on within %s; the step is repeated", format_bytes(budget_bytes))
