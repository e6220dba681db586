"""A GPU's memory as seen by this process: total, free, and expandable segments."""

import logging
import os
from dataclasses import dataclass

import torch

from alignprop_fast.ops.garbage import collect_garbage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceMemory:
    """device: its name. own_bytes: tensors of this process. free_bytes: memory that the driver still has."""

    device: str
    total_bytes: int
    free_bytes: int
    own_bytes: int


def device_memory(device: torch.device) -> DeviceMemory:
    """The present state of a GPU's memory; memory that the allocator holds in reserve is returned first."""
    collect_garbage()
    torch.cuda.empty_cache()
    properties = torch.cuda.get_device_properties(device)
    return DeviceMemory(
        properties.name, properties.total_memory, driver_bytes(device), torch.cuda.memory_allocated(device)
    )


def driver_bytes(device: torch.device) -> int:
    """Memory that the driver still has for this process, within its limit (`set_per_process_memory_fraction`)."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    limit_bytes = int(torch.cuda.get_per_process_memory_fraction(device) * total_bytes)
    return max(0, min(free_bytes, limit_bytes - torch.cuda.memory_reserved(device)))


def use_growing_segments() -> None:
    """Turn on expandable segments, which avoid fragmentation, so that tensors can use a whole budget. Holds for later
    allocations, whether CUDA has started or not; a setting in the user's environment is kept."""
    said = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments" in said:
        return
    try:
        # Settings that are left out would return to their defaults.
        torch._C._accelerator_setAllocatorSettings(",".join(filter(None, (said, "expandable_segments:True"))))
    except (AttributeError, RuntimeError) as error:
        log.warning(
            "expandable segments could not be turned on (%s): set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
            " ".join(str(error).split()),
        )
