"""Times calls in turns, with events and the host's clock, and measures their peaks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from alignprop_fast.ops.errors import is_out_of_memory
from alignprop_fast.ops.garbage import collect_garbage
from alignprop_fast.runtime import PeakMeter


@dataclass
class Call:
    """A call to time. prepare: runs before it, untimed. flop: the FLOP that it cannot avoid, or None."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    flop: float | None = None
    device_seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)

    def once(self, device: torch.device) -> None:
        """Run on an idle device. The host's seconds end when everything is launched, not when it is done."""
        self.prepare()
        if device.type != "cuda":
            begin = time.perf_counter()
            self.run()
            self.device_seconds.append(time.perf_counter() - begin)
            self.host_seconds.append(self.device_seconds[-1])
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        start.record()
        self.run()
        end.record()
        self.host_seconds.append(time.perf_counter() - begin)
        torch.cuda.synchronize(device)
        self.device_seconds.append(start.elapsed_time(end) / 1000)

    def figures(self, rate: float) -> dict[str, Any]:
        """Median and spread of the seconds, the share of a matrix product's rate, and whether launches are the bound.

        launch_bound: the host's seconds over the device's; near 1 the device waits for the host.
        """
        seconds = statistics.median(self.device_seconds)
        figures = {
            "seconds": seconds,
            "least_seconds": min(self.device_seconds),
            "most_seconds": max(self.device_seconds),
            "host_seconds": statistics.median(self.host_seconds),
            "launch_bound": round(statistics.median(self.host_seconds) / seconds, 3),
            "rounds": len(self.device_seconds),
        }
        if self.flop is not None:
            figures["matrix_share"] = round(self.flop / seconds / rate, 4)
        return figures


def first_run(call: Call, device: torch.device, warm: bool = True) -> dict[str, Any]:
    """Run once to warm up and once for the peaks, in bytes including those alive before; or say why it cannot run.

    warm: False for only one run, whose peak then includes compiling and autotuning.
    """
    reason = None
    try:
        call.prepare()
        if warm:
            call.run()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        with PeakMeter(device) as meter:
            call.run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0][:120]
    if reason is not None:  # outside the handler, because its traceback keeps the call's tensors alive
        collect_garbage()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return {"out_of_memory": reason}
    if device.type != "cuda":
        return {"peak_bytes": meter.peak_bytes}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def in_turns(calls: Sequence[Call], device: torch.device, rounds: int, seconds: float) -> None:
    """Run each once per round: at least two rounds, then as many as fit into the seconds, at most `rounds`."""
    begin = time.monotonic()
    for done in range(rounds):
        if done >= 2 and time.monotonic() - begin > seconds:
            return
        for call in calls:
            call.once(device)


def ratio(slower: Call, faster: Call) -> dict[str, float]:
    """The speed ratio of each round: median, least, most."""
    pairs = zip(slower.device_seconds, faster.device_seconds, strict=False)
    ratios = [one / two for one, two in pairs]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
    }
