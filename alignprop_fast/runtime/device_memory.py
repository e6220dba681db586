"""A GPU's memory as this process finds it: what it has, what is free, and segments that grow."""

import gc
import logging
import os
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceMemory:
    """device: its name. own_bytes: tensors of this process. free_bytes: what the driver would still hand out."""

    device: str
    total_bytes: int
    free_bytes: int
    own_bytes: int


def device_memory(device: torch.device) -> DeviceMemory:
    """What there is on a GPU now; what the allocator only holds in reserve is given back first."""
    gc.collect()
    torch.cuda.empty_cache()
    properties = torch.cuda.get_device_properties(device)
    return DeviceMemory(
        properties.name, properties.total_memory, driver_bytes(device), torch.cuda.memory_allocated(device)
    )


def driver_bytes(device: torch.device) -> int:
    """What the driver would still hand out to this process, within its limit (`set_per_process_memory_fraction`)."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    limit_bytes = int(torch.cuda.get_per_process_memory_fraction(device) * total_bytes)
    return max(0, min(free_bytes, limit_bytes - torch.cuda.memory_reserved(device)))


def use_growing_segments() -> None:
    """With segments that grow, live tensors can fill a budget instead of its pieces. Holds for what is allocated from
    now on, CUDA started or not; what the user's environment says about it stays."""
    said = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments" in said:
        return
    try:
        # A setting that is left out would go back to its default.
        torch._C._accelerator_setAllocatorSettings(",".join(filter(None, (said, "expandable_segments:True"))))
    except (AttributeError, RuntimeError) as error:
        log.warning(
            "the allocator's segments do not grow (%s): set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
            " ".join(str(error).split()),
        )
