"""Page-locked host memory for offloading: allocated to the byte, kept, handed out again, and in the end given back.

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

# Gates are drawn anew for each training step, so that its plan differs from the last one's: what one plan has no use
# for the next one may want. Locking a GiB takes about a third of a second.
IDLE_CHAINS = 16


class HostBuffer:
    """size_bytes of host memory.

    memory: [size_bytes] of uint8; None: bytes are only counted (`CountedPool`).
    after: the event of the last copy that touches it, to be waited for; None: there is no such copy.
    """

    def __init__(self, size_bytes: int, memory: torch.Tensor | None):
        self.size_bytes, self.memory = size_bytes, memory
        self.after: Any = None
        self.last_chain = 0

    def touched(self, stream: Any) -> None:
        """A copy from or to it has just been given to the stream; None: there are no streams, and it is made."""
        self.after = None if stream is None else stream.record_event()


class HostPool:
    """Host buffers by size.

    size_bytes: what they take in all, free ones included.
    limit_bytes: the most that they are to take; lowered where the driver refuses to lock so much. None: no limit.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None = None):
        self.device = device
        self._free: dict[int, list[HostBuffer]] = defaultdict(list)  # in each list first what has waited longest
        self._chains = 0
        self.size_bytes, self.limit_bytes = 0, limit_bytes

    def take(self, size_bytes: int) -> HostBuffer:
        """A buffer of this size, a new one only where none is free."""
        if self._free[size_bytes]:
            return self._free[size_bytes].pop()
        if self.limit_bytes is not None:
            self._shrink(self.limit_bytes - size_bytes)
        buffer = HostBuffer(size_bytes, self._allocate(size_bytes))
        self.size_bytes += size_bytes
        return buffer

    def give(self, buffer: HostBuffer) -> None:
        """Take the buffer back; it may be handed out at once, for who writes to it waits for `after`."""
        buffer.last_chain = self._chains
        self._free[buffer.size_bytes].append(buffer)

    def begin_chain(self) -> None:
        """Give the system back what none of the last `IDLE_CHAINS` chains has used."""
        self._chains += 1
        for buffers in self._free.values():
            while buffers and buffers[0].last_chain <= self._chains - IDLE_CHAINS:
                self._drop(buffers.pop(0))

    def _shrink(self, to_bytes: int) -> None:
        """Give free buffers back to the system until no more than that is held, or all that is held is in use."""
        for buffers in self._free.values():
            while buffers and self.size_bytes > to_bytes:
                self._drop(buffers.pop(0))

    def _drop(self, buffer: HostBuffer) -> None:
        if buffer.after is not None:
            buffer.after.synchronize()
        self.size_bytes -= buffer.size_bytes

    def _allocate(self, size_bytes: int) -> torch.Tensor | None:
        memory = torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8)  # whole pages, of nobody else
        if self.device.type == "cuda":
            self._lock(memory)
        return memory

    def _lock(self, memory: torch.Tensor) -> None:
        """Register with the driver. Memory that it refuses serves as it is: copies are slow then, and right."""
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self.device):
            error = int(runtime.cudaHostRegister(memory.data_ptr(), len(memory), 0))
        if error == 0:
            # Not when the program ends, when the driver may be gone already.
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
    """Buffers that take no memory, where only bytes are of interest: zeros come back from them."""

    def _allocate(self, size_bytes: int) -> None:
        return None


def _forget_error(device: torch.device) -> None:
    """The next kernel would be taken for what failed: the driver remembers an error until someone asks for it."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device)
