"""Costs of a network's blocks under each option, from one run of the network and runs of one block of each kind.

The network runs once under the leanest option. Blocks of one kind cost the same (`work.Call`), so the other options
run on the first block of each kind alone, on inputs like those it had. What an option changes there, it changes for
each block of the kind.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from alignprop_fast.planner import BlockOption, Option, Segment
from alignprop_fast.runtime.told import Told, nobody
from alignprop_fast.runtime.trace import trace
from alignprop_fast.runtime.work import Call, Interval, Like, Work

LEANEST = BlockOption.RECOMPUTE


def segments(work: Work, offload: bool = False, told: Told = nobody) -> tuple[Segment, ...]:
    """The segments of the work, each with all its options.

    If the network fits under the leanest option, one block alone fits under each.

    offload: whether an option also has a variant whose kept tensors are offloaded, unless all are too small to be
        moved. Its seconds are without the copies (`CostTable.with_copies`).
    told: is told which share of the work is done.

    Raises:
        RuntimeError: out of memory (`ops.errors`): not even the leanest options fit.
    """
    lean = trace(work, {"*": LEANEST})
    alone: dict[Hashable, Mapping[BlockOption, Interval]] = {}
    for index, interval in enumerate(lean.intervals):
        told(0.3 + 0.7 * index / len(lean.intervals))
        if (call := interval.call) is not None and call.kind not in alone:
            alone[call.kind] = _alone(work, call, lean.owned, offload)
    return tuple(_segment(interval, alone) for interval in lean.intervals)


def transfer_bytes(found: Sequence[Segment]) -> int:
    """The most bytes that the block before each one can have in transfer to or from host memory."""
    return max((option.host_bytes for segment in found for option in segment.options), default=0)


def _segment(lean: Interval, alone: Mapping[Hashable, Mapping[BlockOption, Interval]]) -> Segment:
    """The segment of an interval that was measured under the leanest option."""
    if lean.call is None:
        return Segment("rest", (lean.option(BlockOption.KEEP),))
    block, found = lean.call.block, alone[lean.call.kind]
    options: list[Option] = []
    for name in block.grades():
        option = _changed(lean, found[LEANEST], found[name]).option(name)
        options.append(option)
        if name.offloaded in found and found[name.offloaded].host_bytes:
            there = _changed(lean, found[LEANEST], found[name.offloaded]).option(name.offloaded)
            options.append(replace(there, seconds=option.seconds))
    return Segment(block.name, tuple(options))


def _changed(interval: Interval, lean: Interval, other: Interval) -> Interval:
    """An interval under another option. lean, other: a block of its kind alone, under the leanest and that option."""
    more_bytes = other.kept_bytes - lean.kept_bytes
    return replace(
        interval,
        kept_bytes=max(interval.kept_bytes + more_bytes, 0),
        host_bytes=other.host_bytes,
        block_transient=interval.block_transient + other.block_transient - lean.block_transient,
        gap_transient=interval.gap_transient - more_bytes,
        block_seconds=interval.block_seconds + other.block_seconds - lean.block_seconds,
    )


def _alone(work: Work, call: Call, owned: frozenset[int], offload: bool) -> dict[BlockOption, Interval]:
    """The block of the call alone under each option."""
    grades = call.block.grades()
    alone = _BlockAlone(work, call, owned).work()
    options = (*grades, *(grade.offloaded for grade in grades if offload))
    return {option: trace(alone, {"*": option}).intervals[0] for option in options}


class _BlockAlone:
    """A block as a network of its own, with inputs like those of a call.

    Owned inputs are made in each run, and only the block can keep them; the others are there before. No input is zero,
    because a GPU multiplies zeros faster.
    """

    def __init__(self, network: Work, call: Call, owned: frozenset[int]):
        self.network, self.call, self.owned = network, call, owned
        self.start = torch.zeros((), device=network.device, requires_grad=True)
        self.shared = {x.storage: self._memory(x) for x in self._likes() if x.storage not in owned}

    def work(self) -> Work:
        leaves = [self.start, *self.network.leaves]  # of the latter only those that the block reads get a gradient
        return replace(self.network, forward=self.forward, blocks=[self.call.block], leaves=leaves)

    def forward(self) -> torch.Tensor:
        memory = {x.storage: self._memory(x) for x in self._likes() if x.storage in self.owned}
        args, kwargs = tree_map(partial(self._tensor, {**self.shared, **memory}), self.call.inputs)
        del memory
        with self.network.around_block():
            out = self.call.block.module(*args, **kwargs)
        return _End.apply(*(x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.requires_grad))

    def _likes(self) -> list[Like]:
        return [x for x in tree_leaves(self.call.inputs) if isinstance(x, Like)]

    def _memory(self, like: Like) -> torch.Tensor:
        size = like.storage_bytes // like.dtype.itemsize
        return (
            _Start.apply(self.start, size, like.dtype) if like.requires_grad else _filled(size, like.dtype, self.start)
        )

    @staticmethod
    def _tensor(memory: Mapping[int, torch.Tensor], value: Any) -> Any:
        if not isinstance(value, Like):
            return value
        return memory[value.storage].as_strided(value.shape, value.stride, value.offset)


def _filled(size: int, dtype: torch.dtype, near: torch.Tensor) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.linspace(-1, 1, size, dtype=dtype, device=near.device)
    return torch.ones(size, dtype=dtype, device=near.device)


class _Start(torch.autograd.Function):
    """New memory that requires a gradient, which goes nowhere: unlike a leaf, it is freed if nothing keeps it."""

    @staticmethod
    def forward(ctx: Any, start: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
        return _filled(size, dtype, start)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.new_zeros((), dtype=torch.float32), None, None


class _End(torch.autograd.Function):
    """A number of a block's outputs, which keeps none of them. Their gradients are new tensors of ones."""

    @staticmethod
    def forward(ctx: Any, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.layouts = [(x.shape, x.dtype) for x in outputs]
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.ones(shape, dtype=dtype, device=grad.device) for shape, dtype in ctx.layouts)
