"""Measures which of several implementations is fastest, and by how much."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from alignprop_fast.doctor.attention import Sizes
from alignprop_fast.doctor.ceilings import seconds_of
from alignprop_fast.doctor.checking import Case, Draw, as_list, autograd_of
from alignprop_fast.doctor.report import Fact
from alignprop_fast.ops import attention_backends


def against_plain(cases: Iterable[Case], device: torch.device) -> Iterator[Fact]:
    """Forward plus backward pass of the package's kernels, beside the plain expression with autograd."""
    for case in cases:
        if case.implementation not in ("triton", "csrc"):
            continue
        gs = [torch.ones_like(y) for y in as_list(case.reference(*case.inputs))]
        reference = autograd_of(case.reference, case.learning)
        ours, plain = (seconds_of(partial(run, case.inputs, gs), device) for run in (case.run, reference))
        value = f"{1000 * ours:.3g} ms, plain PyTorch {1000 * plain:.3g} ms: {plain / ours:.2f} times as fast"
        yield Fact("speeds", f"{case.op} {case.implementation} {case.name}", value, plain / ours)


def of_attention(draw: Draw, all_sizes: Iterable[Sizes]) -> Iterator[Fact]:
    """The measurements and choices of `ops.autotune` for attention, in both directions."""
    for sizes in all_sizes:
        q, k = (draw(sizes.b, rows, sizes.h, sizes.d).transpose(1, 2) for rows in (sizes.m, sizes.n))
        for direction in ("forward", "backward"):
            value = attention_backends.explain(direction, q, k)
            yield Fact("speeds", f"attention {direction} {sizes}", value)
