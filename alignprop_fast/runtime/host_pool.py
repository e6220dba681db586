"""Page-locked host memory for offloading: exactly the bytes needed, reused, and returned when idle.

`pin_memory` would round up to a power of two, so whole pages are mapped and registered with the driver instead.
"""

import logging
import mmap
import weakref
from collections import defaultdict
from contextlib import suppress
from typing import Any

import torch

from alignprop_fast.planner import format_bytes

log = logging.getLogger(__name__)

# Each training step draws its gradient steps again, so plans differ, and the next one may need buffers that this one
# does not. Locking a GiB takes about a third of a second.
IDLE_CHAINS = 16


class HostBuffer:
    """size_bytes of host memory.

    memory: [size_bytes] of uint8; None: bytes are only counted (`CountedPool`).
    after: the event of the last copy from or to it, to wait for; None: there is no such copy.
    """

    def __init__(self, size_bytes: int, memory: torch.Tensor | None):
        self.size_bytes, self.memory = size_bytes, memory
        self.after: Any = None
        self.last_chain = 0

    def touched(self, stream: Any) -> None:
        """Note that a copy from or to the buffer is on the stream. None: without streams it is already done."""
        self.after = None if stream is None else stream.record_event()


class HostPool:
    """Host buffers by size.

    size_bytes: of all buffers, free ones included.
    limit_bytes: their largest sum; lowered if the driver refuses to lock so much. None: no limit.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None = None):
        self.device = device
        self._free: dict[int, list[HostBuffer]] = defaultdict(list)  # in each list the longest unused comes first
        self._chains = 0
        self.size_bytes, self.limit_bytes = 0, limit_bytes

    def take(self, size_bytes: int) -> HostBuffer:
        """A buffer of this size; a new one only if none is free."""
        if self._free[size_bytes]:
            return self._free[size_bytes].pop()
        if self.limit_bytes is not None:
            self._shrink(self.limit_bytes - size_bytes)
        buffer = HostBuffer(size_bytes, self._allocate(size_bytes))
        self.size_bytes += size_bytes
        return buffer

    def give(self, buffer: HostBuffer) -> None:
        """Take the buffer back. It may be reused at once, because its next writer waits for `after`."""
        buffer.last_chain = self._chains
        self._free[buffer.size_bytes].append(buffer)

    def begin_chain(self) -> None:
        """Return buffers to the system that none of the last `IDLE_CHAINS` chains has used."""
        self._chains += 1
        for buffers in self._free.values():
            while buffers and buffers[0].last_chain <= self._chains - IDLE_CHAINS:
                self._drop(buffers.pop(0))

    def _shrink(self, to_bytes: int) -> None:
        """Return free buffers to the system until the rest is no larger, or all of the rest is in use."""
        for buffers in self._free.values():
            while buffers and self.size_bytes > to_bytes:
                self._drop(buffers.pop(0))

    def _drop(self, buffer: HostBuffer) -> None:
        if buffer.after is not None:
            buffer.after.synchronize()
        self.size_bytes -= buffer.size_bytes

    def _allocate(self, size_bytes: int) -> torch.Tensor | None:
        memory = torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8)  # whole pages, not shared with others
        if self.device.type == "cuda":
            self._lock(memory)
        return memory

    def _lock(self, memory: torch.Tensor) -> None:
        """Register with the driver. If it refuses, the memory is used unlocked: copies are correct but slow."""
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self.device):
            error = int(runtime.cudaHostRegister(memory.data_ptr(), len(memory), 0))
        if error == 0:
            # Not at the program's end, when the driver may be gone already.
            weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
            return
        _forget_error(self.device)
        if self.limit_bytes is None or self.limit_bytes > self.size_bytes:
            self.limit_bytes = self.size_bytes
            log.warning(
                "the driver locks no more than %s of host memory (error %d), and plans offload no more from now on: "
                "raise ulimit -l",
                format_bytes(self.size_bytes),
                error,
            )


class CountedPool(HostPool):
    """Buffers without memory, for counting bytes; reading them gives zeros."""

    def _allocate(self, size_bytes: int) -> None:
        return None


def _forget_error(device: torch.device) -> None:
    """Read and clear the driver's last error, because it would be attributed to the next kernel."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device)
