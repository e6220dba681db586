"""Measures bytes and seconds: live tensor bytes on the CPU, the allocator's statistics on a GPU."""

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alignprop_fast.planner import Option, Plan, Segment
from alignprop_fast.runtime.chain import Chain, run_chain
from alignprop_fast.runtime.segments import STEP_OPTIONS


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators allocate inside the block, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._alive: dict[int, Any] = {}

    def _free(self, key: int, size_bytes: int) -> None:
        del self._alive[key]
        self.live_bytes -= size_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            # A view of something that was there before the block is not ours to count.
            if id(storage) in self._alive or id(storage) in inputs:
                continue
            size_bytes = storage.nbytes()
            self._alive[id(storage)] = weakref.finalize(storage, self._free, id(storage), size_bytes)
            self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return out

    def stop(self) -> None:
        for finalizer in self._alive.values():
            finalizer.detach()


class PeakMeter:
    """`with PeakMeter(device) as meter:` then `meter.live_bytes()` and `meter.peak_bytes`, both above the start.

    On a GPU from the caching allocator's statistics; elsewhere the bytes of live tensors that were made inside the
    block (which slows small operators down: do not time what you meter).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.peak_bytes = 0

    def __enter__(self) -> "PeakMeter":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start_bytes = torch.cuda.memory_allocated(self.device)
        else:
            self._tracker = _LiveBytes()
            self._tracker.__enter__()
        return self

    def live_bytes(self) -> int:
        """Bytes alive now that were not there at the start."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self._start_bytes
        return self._tracker.live_bytes

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._start_bytes
        else:
            self._tracker.__exit__(*exception)
            self._tracker.stop()
            self.peak_bytes = self._tracker.peak_bytes


def _timed(device: torch.device, fn: Callable[[], Any]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_option(
    name: str, forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], Any] | None, device: torch.device
) -> Option:
    """Bytes and seconds of one way to run a segment: once metered (which also warms up), once timed.

    forward: runs the segment and returns its output; what the output's graph keeps counts as kept.
    backward: consumes that output; None measures a forward pass alone.
    """

    def run() -> None:
        out = forward()
        if backward is not None:
            backward(out)

    with PeakMeter(device) as meter:
        out = forward()
        kept_bytes = meter.live_bytes()
        if backward is not None:
            backward(out)
        del out
    if backward is None:
        kept_bytes = 0
    return Option(name, kept_bytes, meter.peak_bytes - kept_bytes, _timed(device, run))


def measure_segment(
    name: str, lean_first: Sequence[str], measure: Callable[[str], Option], limit_bytes: int
) -> Segment:
    """The options of a segment, measured from the leanest on until one takes more than the limit (or all there is).

    So measuring itself goes past the limit by one option at most.

    Raises:
        torch.OutOfMemoryError: not even the leanest option can run.
    """
    options: list[Option] = []
    for option in lean_first:
        try:
            options.append(measure(option))
        except torch.OutOfMemoryError:
            if not options:
                raise
            break
        if options[-1].kept_bytes + options[-1].transient_bytes > limit_bytes:
            break
    return Segment(name, tuple(options))


def measure_chain(chain: Chain, x: torch.Tensor, limit_bytes: int) -> tuple[Option, Segment]:
    """Costs of one step of the chain at latents x [B, ...]: (without gradient, with gradient by option).

    Runs the network of step 0 and nothing else: no random number is drawn. limit_bytes: see `measure_segment`.
    """
    one = replace(chain, num_steps=1, advance=lambda i, x, y: x.clone())

    def measure(option: str) -> Option:
        plan = Plan(1, (0,), (), resident_options={"step": option})
        start = x.detach().requires_grad_()
        wanted = [start, *chain.parameters]
        return measure_option(
            option,
            lambda: run_chain(one, plan, start),
            lambda out: torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True),
            x.device,
        )

    with torch.no_grad():
        sampling = measure_option("sampling", lambda: run_chain(one, Plan(1, (), ()), x), None, x.device)
    return sampling, measure_segment("step", [*STEP_OPTIONS][::-1], measure, limit_bytes)
