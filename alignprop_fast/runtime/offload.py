"""Moves a block's kept tensors to host memory until its backward pass, in parallel with the computation.

Copies run on their own streams: out while the following blocks run forward, and in one block ahead of the backward
pass. At most two blocks' tensors are on the device at a time: a block's tensors are freed when the next block is done,
and fetched when the backward pass reaches the block after it.

`host_pool` allocates exactly the bytes needed and registers them with the driver. On devices without streams (the CPU,
for tests) the same copies are made at once.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from alignprop_fast.runtime.host_pool import HostBuffer, HostPool

Move = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


class Offloader:
    """Moves kept tensors of blocks to host memory and back. Each chain has its own; `pool` outlives it."""

    def __init__(self, device: torch.device, pool: HostPool | None = None, smallest_bytes: int = 2**16):
        """smallest_bytes: smaller tensors are not moved."""
        self.device, self.pool, self.smallest_bytes = device, pool or HostPool(device), smallest_bytes
        self.out = self.back = None
        if device.type == "cuda":
            self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._last: weakref.ref[_Record] | None = None

    def offloaded(self, module: nn.Module, build: Callable[[Move], Callable[..., Any]]) -> Callable[..., Any]:
        """The forward of a block whose kept tensors are moved to the host.

        build: from the moves (away, back) for results that the block stores itself (`ops.reuse`) to its forward.
        """

        def forward(*args: Any, **kwargs: Any) -> Any:
            before = self._last() if self._last else None
            shared = (value for name, value in kwargs.items() if name != "hidden_states")
            record = _Record(self, before, _staying(module, (*args[1:], *shared)))
            self._last = weakref.ref(record)
            with torch.autograd.graph.saved_tensors_hooks(record.away, record.fetched):
                result = build((record.away, record.fetched))(*args, **kwargs)
            record.sent()
            if before is not None:
                before.let_go()
            return result

        return forward

    def settle(self) -> None:
        """Free the last block's tensors on the device, because no next block will do it."""
        last = self._last() if self._last else None
        if last is not None:
            last.let_go()


class _Handle:
    """One tensor on the host, or being copied back."""

    def __init__(self, x: torch.Tensor, buffer: HostBuffer):
        self.shape, self.dtype = x.shape, x.dtype
        self.stride = x.stride() if _is_dense(x) else _contiguous(x.shape)
        self.buffer, self.uses = buffer, 0
        self.device_tensor: torch.Tensor | None = x

    def copy_out(self, x: torch.Tensor, stream: Any) -> None:
        """Copy x into the buffer, in the current stream."""
        if self.buffer.after is not None:
            stream.wait_event(self.buffer.after)
        if self.buffer.memory is not None:
            self._on_host(self.buffer.memory).copy_(x, non_blocking=True)
        self.buffer.touched(stream)

    def copy_back(self, stream: Any) -> None:
        """Copy the buffer into `device_tensor`, in the current stream."""
        assert self.device_tensor is not None
        if self.buffer.memory is None:
            self.device_tensor.zero_()  # zero is also valid as an index
        else:
            self.device_tensor.copy_(self._on_host(self.buffer.memory), non_blocking=True)
        self.buffer.touched(stream)

    def _on_host(self, memory: torch.Tensor) -> torch.Tensor:
        return memory.view(self.dtype).as_strided(self.shape, self.stride)


class _Record:
    """The tensors that one run of one block has moved away."""

    def __init__(self, owner: Offloader, before: "_Record | None", staying: set[int]):
        self.owner, self.staying = owner, staying
        self.before = weakref.ref(before) if before is not None else None
        self.handles: weakref.WeakValueDictionary[Any, _Handle] = weakref.WeakValueDictionary()
        self.out_event: Any = None
        self.back_event: Any = None
        self.fetching = False

    @torch.no_grad()
    def away(self, x: torch.Tensor) -> Any:
        """x, or a handle for it if it is worth moving. For use as a pack hook."""
        key = (_storage(x), x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)
        # An operator's own output and its graph would keep each other alive, so if a step fails nothing could free
        # them. (A detached tensor still knows the tensor it is a view of.)
        x = x.data
        size_bytes = x.numel() * x.element_size()
        if (
            x.device.type != self.owner.device.type  # "cuda" and "cuda:0" are not equal
            # Tensors that free no memory are not moved: a packed weight that behaves like a dense one has no storage.
            or min(size_bytes, x.untyped_storage().nbytes()) < self.owner.smallest_bytes
            or _storage(x) in self.staying
        ):
            return x
        handle = self.handles.get(key)
        if handle is None:
            handle = self.handles[key] = self._send(x, size_bytes)
        handle.uses += 1
        return self, handle

    def _send(self, x: torch.Tensor, size_bytes: int) -> _Handle:
        buffer = self.owner.pool.take(size_bytes)
        handle = _Handle(x, buffer)
        # Not at the program's end, when the driver may be gone already.
        weakref.finalize(handle, _give_back, self.owner.pool, buffer, self.owner.device).atexit = False
        with _on(self.owner.out, self.owner.device):
            handle.copy_out(x, self.owner.out)
        return handle

    def sent(self) -> None:
        """Note that the block's forward pass is done."""
        if self.owner.out is not None:
            self.out_event = self.owner.out.record_event()

    def let_go(self) -> None:
        """Free the tensors on the device, after they are copied."""
        if self.out_event is not None:
            torch.cuda.current_stream(self.owner.device).wait_event(self.out_event)
        if not self.fetching:
            for handle in list(self.handles.values()):
                handle.device_tensor = None

    def fetched(self, packed: Any) -> torch.Tensor:
        """The tensor of a handle, on the device again. For use as an unpack hook."""
        if isinstance(packed, torch.Tensor):
            return packed
        handle = packed[1]
        self.fetch()
        before = self.before() if self.before is not None else None
        if self.back_event is not None:
            torch.cuda.current_stream(self.owner.device).wait_event(self.back_event)
        if before is not None:
            before.fetch()
        x = handle.device_tensor
        assert x is not None
        handle.uses -= 1
        if handle.uses == 0:
            handle.device_tensor = None
        return x

    @torch.no_grad()
    def fetch(self) -> None:
        """Start the copies back, if not started yet."""
        if self.fetching:
            return
        self.fetching = True
        handles = [handle for handle in self.handles.values() if handle.device_tensor is None]
        for handle in handles:  # allocated in the computation's stream, which owns the memory
            handle.device_tensor = torch.empty_strided(
                handle.shape, handle.stride, dtype=handle.dtype, device=self.owner.device
            )
        with _on(self.owner.back, self.owner.device):
            for handle in handles:
                handle.copy_back(self.owner.back)
        if self.owner.back is not None:
            self.back_event = self.owner.back.record_event()


def _give_back(pool: HostPool, buffer: HostBuffer, device: torch.device) -> None:
    """Called before a handle is freed, together with the device memory of its copies."""
    if buffer.after is not None:
        # If a step failed, a copy may still be running: its memory must not be reused before the copy ends.
        torch.cuda.current_stream(device).wait_event(buffer.after)
    pool.give(buffer)


def _staying(module: nn.Module, others: tuple[Any, ...]) -> set[int]:
    """Storages that exist anyway: weights, and inputs that all blocks share, such as the text embeddings."""
    tensors = [*module.parameters(), *module.buffers(), *(t for t in others if isinstance(t, torch.Tensor))]
    return {_storage(t) for t in tensors}


def _storage(x: torch.Tensor) -> int:
    """The identity of the storage, also on the meta device, where all addresses are 0."""
    return x.untyped_storage()._cdata


def _is_dense(x: torch.Tensor) -> bool:
    """Whether x fills its memory without gaps or overlaps, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


@contextmanager
def _on(stream: Any, device: torch.device) -> Iterator[None]:
    """Run the `with` block on the stream, after everything given to the current one so far."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
