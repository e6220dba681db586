"""Measures rates that no kernel can beat: matrix product, copy, host link. Each takes under a second."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from alignprop_fast.doctor.checking import dtype_name
from alignprop_fast.doctor.report import Fact
from alignprop_fast.runtime import Stopwatch, link_rate

MOST_SECONDS = 0.3  # for one rate, without the first call


def ceilings(device: torch.device, dtypes: Sequence[torch.dtype]) -> Iterator[Fact]:
    """FLOP/s of a square product in each dtype, bytes/s of a copy (read plus written) and of the host link."""
    for dtype in dtypes:
        rate = product_rate(device, dtype)
        yield Fact("ceilings", f"matrix product {dtype_name(dtype)}", f"{rate / 1e12:.3g} TFLOP/s", rate)
    source = torch.zeros(2**28 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / seconds_of(partial(target.copy_, source), device)
    yield Fact("ceilings", "copy", f"{rate / 1e9:.3g} GB/s", rate)
    link = link_rate(device)
    if link is not None:
        yield Fact("ceilings", "host link", f"{link / 1e9:.3g} GB/s", link)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the largest square product that takes less than a tenth of a second, up to 8192."""
    size = 512
    while True:
        a = torch.ones(size, size, device=device).to(dtype)
        seconds = seconds_of(partial(torch.matmul, a, a), device)
        if size == 8192 or 8 * seconds > MOST_SECONDS / 3:
            return 2 * size**3 / seconds
        size *= 2


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of a call, after a first call to warm up; takes about `MOST_SECONDS`."""
    call()
    first = _timed(call, device, 1)
    return _timed(call, device, min(20, max(1, int(MOST_SECONDS / max(first, 1e-6)))))


def _timed(call: Callable[[], object], device: torch.device, times: int) -> float:
    watch = Stopwatch(device)
    watch.enter("calls")
    for _ in range(times):
        call()
    return watch.seconds()["calls"] / times
