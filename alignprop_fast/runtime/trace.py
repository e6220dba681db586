"""Traces one forward and backward run of a network, split at the ends of its blocks: bytes and seconds per interval.

`work` says what an interval is, and `counts` to which one a byte belongs.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from alignprop_fast.planner import Options
from alignprop_fast.runtime.blocks import Block, apply_options
from alignprop_fast.runtime.counts import Counts, intervals
from alignprop_fast.runtime.equal_blocks import EqualBlocks
from alignprop_fast.runtime.host_pool import HostPool
from alignprop_fast.runtime.measure import Stopwatch, storage_key
from alignprop_fast.runtime.offload import Offloader
from alignprop_fast.runtime.work import Call, Like, Part, Trace, Work


def trace(work: Work, options: Options) -> Trace:
    """Run the work under the options: a few times for seconds if the device is timed, then once for bytes.

    The order matters, because the first run compiles kernels and autotunes them, which takes memory.
    Offloading is not timed, because if everything is offloaded, copies wait for each other. Nothing is copied either:
    only bytes are counted, without host memory, and the backward pass gets zeros.
    """
    offloads = any(option.offload for option in options.values())
    seconds = defaultdict(float) if work.is_counted or offloads else _timed(work, options)
    counts = Counts(work)
    equal = EqualBlocks(work.blocks, work.leaves, work.kind_of) if _are_equal(work, options) else None
    with counts.live:
        calls = _run(work, options, counts, counts.pool, equal)
    stands = {} if equal is None else equal.stands
    times = counts.operators(stands) if work.is_counted else seconds
    return Trace(intervals(calls, counts, times, stands), counts.owned)


def _are_equal(work: Work, options: Options) -> bool:
    """Whether one of several equal blocks may stand for others: where they are counted, and under one option."""
    return work.is_counted and set(options) <= {"*"} and not any(option.offload for option in options.values())


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
    ends = _Ends(meter, work, equal)
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

    def __init__(self, meter: Meter, work: Work, equal: EqualBlocks | None):
        self.meter, self.equal, self.calls = meter, equal, list[Call]()
        self._kind_of = work.kind_of
        self._reached = len(work.blocks)  # the block that the backward pass has reached

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
        self.calls.append(call := Call(block, self._kind(block, inputs), inputs))
        if self.equal is None or self.equal.begin(index, block, call.kind, tensors):
            self.meter.take(tensors, ("forward", index))
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(partial(self._end_backward, index))
        self.meter.enter(("forward", index))

    def _kind(self, block: Block, inputs: Any) -> Hashable:
        """Blocks of one kind cost the same: their modules' settings and the layouts of weights and inputs are equal."""
        given = tuple(
            (x.shape, x.stride, x.dtype, x.requires_grad) if isinstance(x, Like) else repr(x)
            for x in tree_leaves(inputs)
        )
        return block.group, given, self._kind_of(block.module)

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
