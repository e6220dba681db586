"""Times calls in turns, so that a drifting clock or a busy machine affects all alike.

On a GPU a large buffer is written between two calls, which empties the L2 cache and hides the launch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

FLUSH_BYTES = 512 * 2**20


def alternate(
    calls: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, list[float] | str]:
    """Seconds of each call, in turns for about `seconds` in total; or the reason why it cannot run."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    times: dict[str, list[float] | str] = {}
    for name, call in calls.items():
        try:
            for _ in range(2):  # the first call compiles
                call()
            times[name] = []
        except Exception as error:  # peers raise anything; the row says what
            times[name] = f"cannot run: {type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
    running = [name for name in calls if isinstance(times[name], list)]
    start, rounds = time.perf_counter(), 0
    while running and (rounds < 3 or (time.perf_counter() - start < seconds and rounds < 200)):
        taken = [_one(calls[name], flush) for name in running]
        for name, value in zip(running, taken, strict=True):
            series = times[name]
            assert isinstance(series, list)
            series.append(value())
        rounds += 1
    return times


def _one(call: Callable[[], object], flush: torch.Tensor | None) -> Callable[[], float]:
    """Run once. The returned function gives the seconds; on a GPU it waits for them."""
    if flush is None:
        begin = time.perf_counter()
        call()
        taken = time.perf_counter() - begin
        return lambda: taken
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    flush.zero_()
    events[0].record()
    call()
    events[1].record()

    def seconds() -> float:
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1000

    return seconds


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The 0.2, 0.5 and 0.8 quantiles, interpolated."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def denominators(dtype: torch.dtype, device: torch.device, small: bool) -> tuple[float, float]:
    """(bytes per second of a large copy, FLOP per second of a large square product), measured now."""
    n, size = (2**22, 512) if small or device.type == "cpu" else (2**28, 8192)
    source, target = torch.zeros(n, dtype=dtype, device=device), torch.empty(n, dtype=dtype, device=device)
    a = torch.randn(size, size, device=device).to(dtype)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "product": lambda: a @ a}
    times = alternate(calls, device, 0.5)
    copy, product = (statistics.median(t) if isinstance(t, list) else float("inf") for t in times.values())
    return 2 * n * dtype.itemsize / copy, 2 * size**3 / product
