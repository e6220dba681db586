"""Measures bytes and seconds: live tensor bytes on the CPU, the allocator's statistics on a GPU."""

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignprop_fast.ops.garbage import collect_garbage
from alignprop_fast.runtime.host_pool import HostPool
from alignprop_fast.runtime.meta_results import Known, is_view, meta_result, new_among, tensors_in

OnOperator = Callable[[Any, Any, Any, Known | None], None]


def allocated_bytes(size_bytes: int, device: torch.device) -> int:
    """Bytes that the device's allocator takes for a tensor of this size: on a GPU a multiple of 512."""
    return -(-size_bytes // 512) * 512 if device.type == "cuda" else size_bytes


def storage_key(tensor: torch.Tensor) -> int:
    """The identity of the tensor's storage while it lives."""
    return id(tensor.untyped_storage())


@dataclass(slots=True)
class _Living:
    """A storage. label: the part that allocated it. takers: the parts that take it as their input."""

    reference: weakref.ref[Any] | None
    label: Hashable
    size_bytes: int
    takers: set[Hashable] = field(default_factory=set)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators allocate inside the block, until they are freed.

    `enter(label)` starts a part of the block. `peaks` holds the most bytes alive in each part, `starts` those at its
    (first) start. Bytes are charged to
    the part that allocated them, or to the one part that takes them (`take`). `on_operator` is called for each
    operator: (function, arguments, result, what is known of it).

    device: a GPU, whose allocator then gives the peaks, because kernels take workspaces that no result shows.
    """

    def __init__(self, on_operator: OnOperator | None = None, device: torch.device | None = None) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peaks: dict[Hashable, int] = {None: 0}
        self.starts: dict[Hashable, int] = {}
        self._label: Hashable = None
        self._alive: dict[int, _Living] = {}
        self._on_operator = on_operator
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._start_bytes = 0

    def __enter__(self) -> "LiveBytes":
        if self._gpu is not None:
            collect_garbage()  # earlier garbage must not be counted and then vanish midway
            torch.cuda.reset_peak_memory_stats(self._gpu)
            self._start_bytes = torch.cuda.memory_allocated(self._gpu)
        return super().__enter__()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell PyTorch not to guard each operator from torch.compile, which takes as long as counting it."""
        return False

    @property
    def peak_bytes(self) -> int:
        return max(self.peaks.values())

    def enter(self, label: Hashable) -> None:
        self._leave()
        self._label = label
        self.starts.setdefault(label, self.live_bytes)
        self.peaks[label] = max(self.peaks.get(label, 0), self.live_bytes)

    def _leave(self) -> None:
        if self._gpu is not None:
            peak_bytes = torch.cuda.max_memory_allocated(self._gpu) - self._start_bytes
            self.peaks[self._label] = max(self.peaks[self._label], peak_bytes)
            torch.cuda.reset_peak_memory_stats(self._gpu)

    def take(self, tensors: Iterable[torch.Tensor], label: Hashable) -> None:
        """Charge these tensors to the part of this label, unless another part takes them too."""
        for tensor in tensors:
            if (living := self._alive.get(storage_key(tensor))) is not None:
                living.takers.add(label)

    def charged(self) -> dict[Hashable, int]:
        """Bytes alive now, by the part to which they are charged."""
        totals: dict[Hashable, int] = defaultdict(int)
        for living in self._alive.values():
            totals[next(iter(living.takers)) if len(living.takers) == 1 else living.label] += living.size_bytes
        return totals

    def owned(self) -> frozenset[int]:
        """The living storages that one part alone takes, by key."""
        return frozenset(key for key, living in self._alive.items() if len(living.takers) == 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_view(func):  # half of all operators
            return func(*args, **kwargs)
        out, new, known = meta_result(func, args, kwargs)
        if new is None:  # views of storages from before the block are not counted
            new = new_among(out, tensors_in(args, kwargs))
        for tensor in new:
            self._count(tensor.untyped_storage())
        if self._on_operator is not None:
            self._on_operator(func, (args, kwargs), out, known)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive:
            return
        size_bytes = allocated_bytes(storage.nbytes(), storage.device)
        self._alive[key] = _Living(weakref.ref(storage, partial(self._free, key, size_bytes)), self._label, size_bytes)
        self.live_bytes += size_bytes
        self.peaks[self._label] = max(self.peaks[self._label], self.live_bytes)

    def _free(self, key: int, size_bytes: int, reference: weakref.ref[Any]) -> None:
        del self._alive[key]
        self.live_bytes -= size_bytes

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._leave()
        for living in self._alive.values():
            living.reference = None  # what is freed from now on is not counted


class PeakMeter:
    """`with PeakMeter(device) as meter:` then `meter.live_bytes()` and `meter.peak_bytes`, both above the start.

    On a GPU they come from the caching allocator's statistics. Elsewhere they count live tensors made inside the block,
    which slows small operators down: do not time what you meter.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.peak_bytes = 0

    def __enter__(self) -> "PeakMeter":
        if self.device.type == "cuda":
            collect_garbage()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start_bytes = torch.cuda.memory_allocated(self.device)
        else:
            self._tracker = LiveBytes()
            self._tracker.__enter__()
        return self

    def live_bytes(self) -> int:
        """Bytes alive now that were not alive at the start."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self._start_bytes
        return self._tracker.live_bytes

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._start_bytes
        else:
            self._tracker.__exit__(*exception)
            self.peak_bytes = self._tracker.peak_bytes


class Workspaces:
    """`with Workspaces(device) as held:` run the later work once; then `held.size_bytes` is the GPU memory that
    libraries keep from their first use on (cuBLAS, for each thread that calls it)."""

    def __init__(self, device: torch.device):
        self.device, self.size_bytes = device, 0

    def __enter__(self) -> "Workspaces":
        if self.device.type == "cuda":
            collect_garbage()
            torch._C._cuda_clearCublasWorkspaces()  # they may exist already
            self._start_bytes = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            collect_garbage()
            self.size_bytes = max(torch.cuda.memory_allocated(self.device) - self._start_bytes, 0)


class Stopwatch:
    """Seconds between labels: `enter(label)` ends one part and starts the next; `seconds()` waits for the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stamps: list[tuple[Hashable, Any]] = []

    def enter(self, label: Hashable) -> None:
        if self.device.type == "cuda":
            stamp: Any = torch.cuda.Event(enable_timing=True)
            stamp.record(torch.cuda.current_stream(self.device))
        else:
            stamp = time.perf_counter()
        self._stamps.append((label, stamp))

    def seconds(self) -> defaultdict[Hashable, float]:
        """Seconds of each part, the last one until now."""
        self.enter(None)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        totals: defaultdict[Hashable, float] = defaultdict(float)
        for (label, start), (_, end) in zip(self._stamps, self._stamps[1:], strict=False):
            totals[label] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        return totals


def link_rate(device: torch.device, size_bytes: int = 2**26) -> float | None:
    """Measured bytes/s between registered host memory and the device; None if there is no link, or if the driver
    registers no host memory."""
    if device.type != "cuda":
        return None
    pool = HostPool(device)
    buffer = pool.take(size_bytes).memory
    if buffer is None or pool.limit_bytes is not None:  # refused
        return None
    there = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    there.copy_(buffer)
    watch = Stopwatch(device)
    watch.enter("copy")
    for _ in range(3):
        there.copy_(buffer, non_blocking=True)
    return 3 * size_bytes / watch.seconds()["copy"]
