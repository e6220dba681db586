"""What is measured, and what comes out: a network, the intervals of its run and their costs.

An interval is a block and the gap before it: whatever runs between it and the previous block. The last one is
everything after all blocks.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import torch

from alignprop_fast.planner import BlockOption, Operators, Option, Time
from alignprop_fast.runtime.blocks import Block

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
    kinds: of modules, found so far: a block runs alone a dozen times.
    """

    forward: Callable[[], torch.Tensor]
    pull: Callable[[torch.Tensor, Sequence[torch.Tensor]], Any] | None
    blocks: Sequence[Block]
    device: torch.device
    leaves: Sequence[torch.Tensor] = ()
    output_kept: bool = True
    around_block: Callable[[], AbstractContextManager[Any]] = nullcontext
    repeats: int = 2
    kinds: dict[torch.nn.Module, Hashable] = field(default_factory=dict)

    @property
    def is_counted(self) -> bool:
        return self.device.type == "meta"

    def kind_of(self, module: torch.nn.Module) -> Hashable:
        """The settings of a module and all inside it (numbers and texts, which no weight shows), and its weights'
        layouts. Modules of one kind cost the same on inputs of the same layouts."""
        if module not in self.kinds:
            self.kinds[module] = _kind_of(module)
        return self.kinds[module]


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


def _kind_of(module: torch.nn.Module) -> Hashable:
    modules = list(module.modules())
    settings = tuple((type(m), *_settings(m)) for m in modules)
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    return settings, tuple((t.shape, t.dtype, t.requires_grad) for t in tensors)


# Not `int | float | str`, which takes Python three times as long.
_PLAIN = (int, float, str)


def _settings(module: torch.nn.Module) -> Iterator[Hashable]:
    for name, value in vars(module).items():
        # Z-Image's blocks know their number, and do not use it.
        if isinstance(value, _PLAIN) and name != "layer_id":
            yield name, value
