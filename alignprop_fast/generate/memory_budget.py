"""The memory budget of a sampler: the one asked for, reduced once to the device's free memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict

import torch

from alignprop_fast.planner import AUTO, budget_from_free, parse_budget
from alignprop_fast.runtime import device_memory, driver_bytes, unless_out_of_memory, use_growing_segments

logger = logging.getLogger(__name__)


class MemoryBudget:
    """The memory that live tensors may take on the device, weights included.

    Args:
        wanted: bytes, "24GiB", "auto" (on a GPU its free memory, elsewhere no budget), or None or "none".
        device: where the model is now.

    Attributes:
        size_bytes: None if there is no budget, and with "auto" until it is settled.
        note: one line that explains the budget; "" until it is settled on a GPU.

    Raises:
        ValueError: `wanted` is neither a positive size nor one of the words.
    """

    def __init__(self, wanted: int | str | None, device: torch.device):
        parsed = parse_budget(wanted)
        self.size_bytes = parsed if isinstance(parsed, int) else None
        self.note = ""
        self.takes_what_is_free, self.is_settled = parsed == AUTO, False
        if parsed is not None and device.type == "cuda":
            use_growing_segments()

    def exists(self, device: torch.device) -> bool:
        """Whether plans are made within a budget on this device."""
        return self.size_bytes is not None or (self.takes_what_is_free and device.type == "cuda")

    def settle(self, device: torch.device, warm_up: Callable[[], None]) -> int:
        """The budget in bytes. On a GPU it is at most the free memory, which is looked up once.

        Call it after costs were measured, because by then kernels are loaded and libraries have their memory.

        warm_up: runs everything once that has not run yet.
        """
        if not self.is_settled and device.type == "cuda":
            # A run that is out of memory has still loaded the kernels it reached. The leaner plan decides what fits.
            unless_out_of_memory(warm_up)
            wanted_bytes, memory = self.size_bytes, device_memory(device)
            self.size_bytes, self.note = budget_from_free(**asdict(memory), wanted_bytes=wanted_bytes)
            is_less = wanted_bytes is not None and wanted_bytes > self.size_bytes
            logger.log(logging.WARNING if is_less else logging.INFO, self.note)
        self.is_settled = True
        assert self.size_bytes is not None
        return self.size_bytes

    def room_bytes(self, device: torch.device) -> float:
        """Bytes that the device, or the budget, has left now."""
        if device.type != "cuda":
            return math.inf
        allocated = torch.cuda.memory_allocated(device)
        free = driver_bytes(device) + torch.cuda.memory_reserved(device) - allocated
        return free if self.size_bytes is None else min(free, self.size_bytes - allocated)
