"""Meters of bytes and seconds."""

import time

import torch

from alignprop_fast.runtime import PeakMeter, Stopwatch

CPU = torch.device("cpu")


def test_peak_meter_counts_what_is_made_inside():
    outside = torch.ones(1000)
    with PeakMeter(CPU) as meter:
        a = outside + 1
        view = a[10:]
        b = a * 2
        assert meter.live_bytes() == 8000
        del a
        assert meter.live_bytes() == 8000
        del view
        assert meter.live_bytes() == 4000
        outside.add_(1)
        outside.view(10, 100).t()
        del b
    assert meter.peak_bytes == 8000


def test_stopwatch_tells_parts_apart():
    watch = Stopwatch(CPU)
    for label, naps in (("a", 1), ("b", 4), ("a", 1)):
        watch.enter(label)
        time.sleep(0.01 * naps)
    seconds = watch.seconds()
    # Sleeping takes at least the time asked for; how much longer depends on the machine.
    assert seconds["a"] >= 0.02 and seconds["b"] >= 0.04 and set(seconds) == {"a", "b"}
