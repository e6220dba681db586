"""Traces one forward and backward run of a network, split at the ends of its blocks: bytes and seconds per interval.

An interval is a block and the gap before it: whatever runs between it and the previous block. The last one is
everything after all blocks. Each byte is charged to the interval that allocated it, but a tensor that one block alone
takes as its input is charged to that block, because the block's option decides whether it stays. So the costs of mixed
options are sums over the blocks (`planner.table` has the arithmetic).
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from alignprop_fast.planner import BlockOption, Operator, Operators, Option, Options, Time
from alignprop_fast.runtime.blocks import Block, apply_options
from alignprop_fast.runtime.equal_blocks import EqualBlocks, module_kind
from alignprop_fast.runtime.estimate import counted_operator
from alignprop_fast.runtime.host_pool import CountedPool, HostPool
from alignprop_fast.runtime.measure import LiveBytes, Stopwatch, storage_key
from alignprop_fast.runtime.meta_results import Known
from alignprop_fast.runtime.offload import Offloader

# ("before", i): the gap before block i, forward. ("forward", i), ("backward", i): block i. ("after", i): the gap before
# block i, backward.
Part = tuple[str, int]


@dataclass(frozen=True)
class Work:
    """A network to measure. On meta tensors its operators are counted; elsewhere the device is timed.

    forward: () -> output with its graph; runs inside `apply_options`.
    pull: (output, leaves): runs the backward pass, which consumes the output; None: forward only.
    leaves: the tensors that get a gradient.
    output_kept: whether the output counts as kept.
    around_block: the context in which a block runs alone.
    repeats: runs that are timed; the shortest one counts, because the first one warms up.
    """

    forward: Callable[[], torch.Tensor]
    pull: Callable[[torch.Tensor, Sequence[torch.Tensor]], Any] | None
    blocks: Sequence[Block]
    device: torch.device
    leaves: Sequence[torch.Tensor] = ()
    output_kept: bool = True
    around_block: Callable[[], AbstractContextManager[Any]] = nullcontext
    repeats: int = 2

    @property
    def is_counted(self) -> bool:
        return self.device.type == "meta"


@dataclass(frozen=True)
class Like:
    """The layout of a tensor. storage: the identity of its storage, whose size is storage_bytes."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    requires_grad: bool
    storage: int
    storage_bytes: int


@dataclass(frozen=True)
class Call:
    """A run of a block.

    inputs: (args, kwargs) with a `Like` for each tensor. kind: blocks of one kind cost the same.
    """

    block: Block
    kind: Hashable
    inputs: Any


@dataclass(frozen=True)
class Interval:
    """Costs of one interval under one option.

    call: of its block; None: what follows all blocks.
    host_bytes: moved to host memory. The previous block's tensors that are being copied are not counted.
    block_transient, gap_transient: bytes at the worst moment of the block and of the gap, beside all kept ones, the
        interval's included. A gap may take less than those, so that the number is negative.
    """

    call: Call | None
    kept_bytes: int
    host_bytes: int
    block_transient: int
    gap_transient: int
    block_seconds: Time
    gap_seconds: Time

    @property
    def transient_bytes(self) -> int:
        return max(self.block_transient, self.gap_transient, 0)

    @property
    def seconds(self) -> Any:
        return self.block_seconds + self.gap_seconds

    def option(self, name: BlockOption) -> Option:
        seconds = self.seconds
        if not isinstance(seconds, Operators):
            seconds = max(seconds, 0.0)  # a difference of two short times
        return Option(name, self.kept_bytes, self.transient_bytes, seconds, self.host_bytes)


@dataclass(frozen=True)
class Trace:
    """Intervals in the order of execution. owned: storages that one block alone takes as its input."""

    intervals: list[Interval]
    owned: frozenset[int] = field(default_factory=frozenset)

    @property
    def peak_bytes(self) -> int:
        kept, peak = 0, 0
        for interval in self.intervals:
            kept += interval.kept_bytes
            peak = max(peak, kept + interval.transient_bytes)
        return peak

    @property
    def seconds(self) -> Any:
        return reduce(add, (interval.seconds for interval in self.intervals))


def trace(work: Work, options: Options) -> Trace:
    """Run the work under the options: a few times for seconds if the device is timed, then once for bytes.

    The order matters, because the first run compiles kernels and autotunes them, which takes memory.
    Offloading is not timed, because if everything is offloaded, copies wait for each other. Nothing is copied either:
    only bytes are counted, without host memory, and the backward pass gets zeros.
    """
    offloads = any(option.offload for option in options.values())
    seconds = defaultdict(float) if work.is_counted or offloads else _timed(work, options)
    counts = _Counts(work)
    equal = EqualBlocks(work.blocks, work.leaves) if _are_equal(work, options) else None
    with counts.live:
        calls = _run(work, options, counts, counts.pool, equal)
    stands = {} if equal is None else equal.stands
    times = counts.operators(stands) if work.is_counted else seconds
    return Trace(_intervals(calls, counts, times, stands), counts.owned)


def _are_equal(work: Work, options: Options) -> bool:
    """Whether one of several equal blocks may stand for others: where they are counted, and under one option."""
    return (
        work.is_counted
        and work.pull is not None
        and set(options) <= {"*"}
        and not any(option.offload for option in options.values())
    )


class Meter(Protocol):
    """Told by a run what happens: a part begins, a block takes tensors as its inputs, the forward pass is done."""

    def enter(self, part: Part) -> None: ...

    def take(self, tensors: Iterable[torch.Tensor], part: Part) -> None: ...

    def forward_done(self, out: torch.Tensor) -> None: ...


class _Timer(Stopwatch):
    """Seconds of each part of a run."""

    def take(self, tensors: Iterable[torch.Tensor], part: Part) -> None:
        pass

    def forward_done(self, out: torch.Tensor) -> None:
        pass


class _Counts:
    """Bytes and operators of one run, by part.

    Attributes:
        live: the mode to run under; it counts what is alive and its peaks.
        pool: counts what is offloaded.
        kept: bytes that the forward pass keeps for a backward pass; moved: bytes that it offloads.
        owned: storages that one block alone takes as its input.
    """

    def __init__(self, work: Work):
        self.live = LiveBytes(self._add_operator if work.is_counted else None, work.device)
        self.pool = CountedPool(work.device)
        self.kept: dict[Hashable, int] = {}
        self.moved: dict[Hashable, int] = {}
        self.owned: frozenset[int] = frozenset()
        self._operators: dict[Hashable, list[Operator]] = defaultdict(list)
        self._goes_back, self._output_kept = work.pull is not None, work.output_kept
        self._part: Hashable = None

    def enter(self, part: Part) -> None:
        self.moved[self._part] = self.pool.size_bytes - sum(self.moved.values())
        self.live.enter(part)
        self._part = part

    def take(self, tensors: Iterable[torch.Tensor], part: Part) -> None:
        self.live.take(tensors, part)

    def forward_done(self, out: torch.Tensor) -> None:
        self.owned = self.live.owned()
        if self._goes_back:
            self.kept.update(self.live.charged())
        if self._goes_back and not self._output_kept:
            self.kept[self._part] = max(self.kept[self._part] - out.untyped_storage().nbytes(), 0)

    def _add_operator(self, func: Any, arguments: Any, out: Any, known: Known | None) -> None:
        if known is not None and known.is_counted:
            counted = known.counted
        else:
            counted = counted_operator(func, arguments, out)
            if known is not None:
                known.counted, known.is_counted = counted, True
        if counted is not None:
            self._operators[self._part].append(counted)

    def operators(self, stands: Mapping[int, int]) -> defaultdict[Hashable, Operators]:
        """The operators by part. stands: calls that others stand for."""
        ran = dict(self._operators)
        for index, other in stands.items():
            ran.update({(name, index): self._operators[name, other] for name in ("forward", "backward")})
        return defaultdict(Operators, {part: Operators(operators) for part, operators in ran.items()})


def _timed(work: Work, options: Options) -> defaultdict[Hashable, float]:
    """Seconds of each part in the shortest run."""
    runs = []
    for _ in range(work.repeats):
        timer = _Timer(work.device)
        _run(work, options, timer)
        runs.append(timer.seconds())
    return min(runs, key=lambda run: sum(run.values()))


def _run(
    work: Work, options: Options, meter: Meter, pool: HostPool | None = None, equal: EqualBlocks | None = None
) -> list[Call]:
    """One run, reported to the meter. Returns the blocks' calls in their order. equal: decides which blocks run."""
    offloader = Offloader(work.device, pool)
    ends = _Ends(meter, len(work.blocks), equal)
    with ends.watched(work.blocks):
        meter.enter(("before", 0))
        with apply_options(options, work.blocks, offloader):
            if equal is not None:
                for block in work.blocks:
                    block.module.forward = partial(equal.run, block.module.forward)
            out = work.forward()
        offloader.settle()
        meter.forward_done(out)
        if work.pull is not None:
            meter.enter(("after", len(ends.calls)))
            work.pull(out, work.leaves)
        del out
    return ends.calls


class _Ends:
    """Hooks that tell a meter when blocks begin and end, forward and backward. calls: of the blocks so far."""

    def __init__(self, meter: Meter, blocks: int, equal: EqualBlocks | None):
        self.meter, self.equal, self.calls = meter, equal, list[Call]()
        self._reached = blocks  # the block that the backward pass has reached

    @contextmanager
    def watched(self, blocks: Sequence[Block]) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        for block in blocks:
            handles.append(block.module.register_forward_pre_hook(partial(self._begin, block), with_kwargs=True))
            handles.append(block.module.register_forward_hook(self._end))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, block: Block, module: Any, args: Any, kwargs: Any) -> None:
        index, tensors = len(self.calls), _tensors((args, kwargs))
        inputs = tree_map(_like, (args, kwargs))
        self.calls.append(call := Call(block, _kind(block, inputs), inputs))
        if self.equal is None or self.equal.begin(index, block, call.kind, tensors):
            self.meter.take(tensors, ("forward", index))
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(partial(self._end_backward, index))
        self.meter.enter(("forward", index))

    def _end(self, module: Any, args: Any, out: Any) -> None:
        index = len(self.calls) - 1
        if self.equal is not None:
            self.equal.end(out)
        self.meter.enter(("before", index + 1))
        for tensor in _tensors(out):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._begin_backward, index))

    def _begin_backward(self, index: int, grad: torch.Tensor) -> None:
        if index < self._reached:  # a block with two outputs counts when its first gradient arrives
            self._reached = index
            self.meter.enter(("backward", index))

    def _end_backward(self, index: int, grad: torch.Tensor) -> None:
        if index == self._reached:  # else the tensor came from the block before, which has begun
            self.meter.enter(("after", index))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _like(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return Like(
        value.shape,
        value.stride(),
        int(value.storage_offset()),
        value.dtype,
        value.requires_grad,
        storage_key(value),
        value.untyped_storage().nbytes(),
    )


def _kind(block: Block, inputs: Any) -> Hashable:
    """Blocks of one kind cost the same: their modules' settings and the layouts of weights and inputs are equal."""
    given = tuple(
        (x.shape, x.stride, x.dtype, x.requires_grad) if isinstance(x, Like) else repr(x) for x in tree_leaves(inputs)
    )
    return block.group, given, module_kind(block.module)


def _intervals(
    calls: list[Call], counts: _Counts, seconds: defaultdict[Hashable, Any], stands: Mapping[int, int]
) -> list[Interval]:
    """stands: calls that did not run -> the calls that stand for them."""
    result: list[Interval] = []
    kept, moved, peaks = counts.kept, counts.moved, counts.live.peaks
    beside_bytes, before_bytes, beside = 0, 0, dict[int, int]()
    gradients = {other: _gradients(counts, other) for other in stands.values()}
    # Later blocks' gradients that would be alive in each backward pass, but were not made.
    unmade = [sum(gradients[stands[k]][1] for k in stands if k > index) for index in range(len(calls) + 1)]
    for index, call in enumerate([*calls, None]):
        if (other := stands.get(index)) is not None:
            more_bytes = unmade[other] - (index - other) * gradients[other][0]
            result.append(replace(result[other], call=call, **_transients(peaks, other, beside[other], more_bytes)))
            continue
        before, forward, backward, after = ((name, index) for name in ("before", "forward", "backward", "after"))
        kept_bytes = kept.get(before, 0) + kept.get(forward, 0)
        beside_bytes += kept_bytes
        beside[index] = beside_bytes + before_bytes
        result.append(
            Interval(
                call=call,
                kept_bytes=kept_bytes,
                host_bytes=moved.get(forward, 0),
                **_transients(peaks, index, beside[index], unmade[index]),
                block_seconds=seconds[forward] + seconds[backward],
                gap_seconds=seconds[before] + seconds[after],
            )
        )
        before_bytes = moved.get(forward, 0)
    return result


def _gradients(counts: _Counts, second: int) -> tuple[int, int]:
    """Bytes of the gradients of the leaves of the second of equal blocks, and by how much those that a block makes that
    does not run are smaller. (Gradients may be parts of larger tensors.)"""
    starts = [counts.live.starts["backward", index] for index in (second - 1, second, second + 1)]
    freed_bytes = sum(counts.kept.get((name, second), 0) for name in ("before", "forward"))
    own_bytes = starts[0] + freed_bytes - starts[1]
    return own_bytes, own_bytes - (starts[1] - starts[2])


def _transients(peaks: Mapping[Hashable, int], index: int, beside_bytes: int, more_bytes: int) -> dict[str, int]:
    """Transient bytes of a call and of its gap. more_bytes: alive in the backward pass beside what was counted."""
    forward = [peaks.get((name, index), 0) for name in ("forward", "before")]
    backward = [peaks.get((name, index), 0) + more_bytes for name in ("backward", "after")]
    block, gap = (max(pair) - beside_bytes for pair in zip(forward, backward, strict=True))
    return {"block_transient": block, "gap_transient": gap}
