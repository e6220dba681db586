"""Traces one forward and backward run of a network, split at the ends of its blocks: bytes and seconds per interval.

An interval is a block and whatever runs between it and the previous block; the last one is everything after all blocks.
Each byte is charged to the interval that allocated it. So the costs of mixed options are sums over the blocks, and the
peak of mixed options follows from runs with one option each (`planner.table` has the arithmetic).
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from alignprop_fast.ops.errors import OutOfMemory, unless_out_of_memory
from alignprop_fast.planner import GRADES, BlockOption, Option, Options, Segment
from alignprop_fast.runtime.blocks import Block, apply_options
from alignprop_fast.runtime.host_pool import CountedPool, HostPool
from alignprop_fast.runtime.measure import LiveBytes, Stopwatch
from alignprop_fast.runtime.offload import Offloader

LEANEST = BlockOption.RECOMPUTE
Operator = Callable[[Any, Any, Any], float]


@dataclass(frozen=True)
class Work:
    """A network to measure.

    forward: () -> output with its graph; runs inside `apply_options`.
    backward: consumes that output; None: forward only.
    operator_seconds: (function, arguments, result) -> estimated seconds; None: the device is timed.
    output_kept: whether the output counts as kept.
    """

    forward: Callable[[], torch.Tensor]
    backward: Callable[[torch.Tensor], Any] | None
    blocks: Sequence[Block]
    device: torch.device
    operator_seconds: Operator | None = None
    output_kept: bool = True
    repeats: int = 3


@dataclass(frozen=True)
class Interval:
    """Costs of one interval under one option. Transient bytes come on top of all kept ones, the interval's included.

    host_bytes: moved to host memory. The previous block's tensors that are being copied are not counted.
    """

    block: Block | None
    alike: Hashable
    kept_bytes: int
    host_bytes: int
    forward_transient_bytes: int
    backward_transient_bytes: int
    seconds: float

    def plus(self, richer: "Interval", leaner: "Interval") -> "Interval":
        """This interval, changed by the difference of a similar interval between two options."""
        names = ("kept_bytes", "host_bytes", "forward_transient_bytes", "backward_transient_bytes", "seconds")
        return replace(self, **{n: max(getattr(self, n) + getattr(richer, n) - getattr(leaner, n), 0) for n in names})

    def option(self, name: BlockOption) -> Option:
        transient_bytes = max(self.forward_transient_bytes, self.backward_transient_bytes)
        return Option(name, self.kept_bytes, transient_bytes, max(self.seconds, 0.0), self.host_bytes)


@dataclass(frozen=True)
class Trace:
    """Intervals in the order of execution."""

    intervals: list[Interval]

    @property
    def peak_bytes(self) -> int:
        kept, peak = 0, 0
        for interval in self.intervals:
            kept += interval.kept_bytes
            peak = max(peak, kept + max(interval.forward_transient_bytes, interval.backward_transient_bytes))
        return peak

    @property
    def seconds(self) -> float:
        return sum(interval.seconds for interval in self.intervals)


def trace(work: Work, options: Options) -> Trace:
    """Run the work under the options: a few times for seconds if the device is timed, then once for bytes.

    The order matters, because the first run compiles kernels and autotunes them, which takes memory.
    Offloading is not timed, because if everything is offloaded, copies wait for each other. Nothing is copied either:
    only bytes are counted, without host memory, and the backward pass gets zeros.
    """
    offloads = any(option.offload for option in options.values())
    seconds = {} if work.operator_seconds or offloads else _timed(work, options)
    counts = _Counts(work)
    with counts.live:
        order = _run(work, options, counts.enter, counts.forward_done, counts.pool)
    kept = counts.kept if work.backward else {}
    return Trace(_intervals(order, kept, counts.moved, counts.live.peaks, counts.seconds or seconds))


def segments(work: Work, link: float | None = None) -> tuple[Segment, ...]:
    """The segments of the work, each with all its options.

    An option is measured on all blocks at once, which is exact. If the device lacks memory for that, it is measured on
    one block of each kind, with the leanest options on all others, and similar blocks get the same difference. If that
    does not fit either, the option is left out.

    link: bytes/s to host memory. If given, each option also has a variant whose kept tensors are offloaded.

    Raises:
        RuntimeError: out of memory (`ops.errors`): not even the leanest options fit.
    """
    lean = trace(work, {"*": LEANEST})
    measured = {LEANEST: lean, **_traces(work, GRADES, lean)}
    offloaded = {} if link is None else _traces(work, [grade.offloaded for grade in GRADES], lean)
    result = []
    for index, interval in enumerate(lean.intervals):
        if interval.block is None:
            result.append(Segment("rest", (interval.option(BlockOption.KEEP),)))
            continue
        options: list[Option] = []
        for name in interval.block.grades():
            if name not in measured:
                continue
            option = measured[name].intervals[index].option(name)
            options.append(option)
            if link is not None and option.kept_bytes and name.offloaded in offloaded:
                there = offloaded[name.offloaded].intervals[index].option(name.offloaded)
                options.append(replace(there, seconds=_with_copies(option.seconds, there.host_bytes / link)))
        result.append(Segment(interval.block.name, tuple(options)))
    return tuple(result)


def transfer_bytes(found: Sequence[Segment]) -> int:
    """The most bytes that the block before each one can have in transfer to or from host memory."""
    return max((option.host_bytes for segment in found for option in segment.options), default=0)


def _traces(work: Work, wanted: Iterable[BlockOption], lean: Trace) -> dict[BlockOption, Trace]:
    """The trace of each option on all blocks that have its grade, without options that do not fit."""
    found: dict[BlockOption, Trace] = {}
    for option in wanted:
        blocks = [i.block.name for i in lean.intervals if i.block is not None and option.grade in i.block.grades()]
        if option != LEANEST and blocks and (measured := _measured(work, option, blocks, lean)) is not None:
            found[option] = measured
    return found


def _with_copies(seconds: float, copy_seconds: float) -> float:
    """The copies overlap with the block's own time: about a third of it is forward, the rest backward."""
    return seconds + max(copy_seconds - seconds / 3, 0) + max(copy_seconds - seconds * 2 / 3, 0)


def _measured(work: Work, option: BlockOption, names: Sequence[str], lean: Trace) -> Trace | None:
    """The trace of the option on the blocks of these names; None if the device lacks memory."""
    everywhere = {"*": LEANEST, **dict.fromkeys(names, option)}
    for attempt in (
        partial(trace, work, everywhere),
        partial(measured_on_one_of_each_kind, work, option, names, lean),
    ):
        found = unless_out_of_memory(attempt)
        if not isinstance(found, OutOfMemory):
            return found
    return None


def measured_on_one_of_each_kind(work: Work, option: BlockOption, names: Sequence[str], lean: Trace) -> Trace:
    """The trace of the option on the blocks of these names, from a run on the first of each kind among them."""
    first: dict[Hashable, int] = {}
    for index, interval in enumerate(lean.intervals):
        if interval.block is not None and interval.block.name in names:
            first.setdefault(interval.alike, index)
    blocks = [lean.intervals[index].block for index in first.values()]
    found = trace(work, {"*": LEANEST, **{block.name: option for block in blocks if block is not None}})
    intervals = [
        interval.plus(found.intervals[first[interval.alike]], lean.intervals[first[interval.alike]])
        if interval.block is not None and interval.block.name in names
        else interval
        for interval in lean.intervals
    ]
    return Trace(intervals)


class _Counts:
    """Bytes and estimated seconds of one run, by part.

    Attributes:
        live: the mode to run under; it counts what is alive and its peaks.
        pool: counts what is offloaded.
        kept: bytes that the forward pass keeps; moved: bytes that it offloads.
        seconds: estimates, where the work has them.
    """

    def __init__(self, work: Work):
        on_operator = partial(self._add_seconds, work.operator_seconds) if work.operator_seconds else None
        self.live = LiveBytes(on_operator, work.device)
        self.pool = CountedPool(work.device)
        self.kept: dict[Hashable, int] = {}
        self.moved: dict[Hashable, int] = {}
        self.seconds: dict[Hashable, float] = {}
        self._output_kept = work.output_kept
        self._part: Hashable = None

    def enter(self, part: Hashable) -> None:
        self.moved[self._part] = self.pool.size_bytes - sum(self.moved.values())
        self.live.enter(part)
        self._part = part

    def forward_done(self, out: torch.Tensor) -> None:
        self.kept.update(self.live.born_in())
        if not self._output_kept:
            self.kept[self._part] = max(self.kept[self._part] - out.untyped_storage().nbytes(), 0)

    def _add_seconds(self, operator_seconds: Operator, func: Any, arguments: Any, out: Any) -> None:
        seconds = operator_seconds(func, arguments, out)
        self.seconds[self._part] = self.seconds.get(self._part, 0.0) + seconds


def _timed(work: Work, options: Options) -> dict[Hashable, float]:
    """Seconds of each part in the run of median length, without the first run, which warms up."""
    runs = []
    for _ in range(work.repeats):
        watch = Stopwatch(work.device)
        _run(work, options, watch.enter, lambda out: None)
        runs.append(watch.seconds())
    return sorted(runs, key=lambda run: sum(run.values()))[len(runs) // 2]


def _run(
    work: Work,
    options: Options,
    enter: Callable[[Hashable], None],
    between: Callable[[torch.Tensor], None],
    pool: HostPool | None = None,
) -> list[tuple[Block, Hashable]]:
    """One run. `enter` gets each position, `between` is called after forward. Returns blocks and kinds in run order."""
    offloader = Offloader(work.device, pool)
    order: list[tuple[Block, Hashable]] = []
    with _at_ends(work.blocks, order, enter):
        enter(("forward", 0))
        with apply_options(options, work.blocks, offloader):
            out = work.forward()
        offloader.settle()
        between(out)
        if work.backward is not None:
            enter(("backward", len(order)))
            work.backward(out)
        del out
    return order


@contextmanager
def _at_ends(
    blocks: Sequence[Block], order: list[tuple[Block, Hashable]], enter: Callable[[Hashable], None]
) -> Iterator[None]:
    """Inside, `enter` is called when a block's forward pass is done and when its backward pass starts."""
    reached = [len(blocks)]

    def begin_backward(index: int) -> None:
        if index < reached[0]:  # a block with two outputs counts when its first gradient arrives
            reached[0] = index
            enter(("backward", index))

    def end(block: Block, args: Any, kwargs: Any, out: Any) -> None:
        index = len(order)
        order.append((block, _kind(block, args, kwargs)))
        enter(("forward", index + 1))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda g: begin_backward(index))

    handles = [
        block.module.register_forward_hook(
            lambda module, args, kwargs, out, block=block: end(block, args, kwargs, out), with_kwargs=True
        )
        for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kind(block: Block, args: Any, kwargs: Any) -> Hashable:
    """Blocks of one kind cost the same: their class and the shapes of weights and inputs are equal."""
    inputs = tuple(t.shape for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    weights = tuple((name, p.shape, p.requires_grad) for name, p in block.module.named_parameters())
    return block.group, type(block.module), inputs, weights


def _intervals(
    order: list[tuple[Block, Hashable]],
    kept: Mapping[Hashable, int],
    moved: Mapping[Hashable, int],
    peaks: Mapping[Hashable, int],
    seconds: Mapping[Hashable, float],
) -> list[Interval]:
    result: list[Interval] = []
    total_bytes, before_bytes = 0, 0
    for index, (block, kind) in enumerate([*order, (None, None)]):
        forward, backward = ("forward", index), ("backward", index)
        total_bytes += kept.get(forward, 0)
        result.append(
            Interval(
                block=block,
                alike=kind,
                kept_bytes=kept.get(forward, 0),
                host_bytes=moved.get(forward, 0),
                forward_transient_bytes=max(peaks.get(forward, 0) - total_bytes - before_bytes, 0),
                backward_transient_bytes=max(peaks.get(backward, 0) - total_bytes - before_bytes, 0),
                seconds=seconds.get(forward, 0.0) + seconds.get(backward, 0.0),
            )
        )
        before_bytes = moved.get(forward, 0)
    return result
