"""Counts one run of a network by part, and sums the parts up to intervals.

Each byte is charged to the interval that allocated it, but a tensor that one block alone takes as its input is charged
to that block, because the block's option decides whether it stays. So the costs of mixed options are sums over the
blocks (`planner.table` has the arithmetic).
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from alignprop_fast.planner import Operator, Operators
from alignprop_fast.runtime.estimate import counted_operator
from alignprop_fast.runtime.host_pool import CountedPool
from alignprop_fast.runtime.measure import LiveBytes
from alignprop_fast.runtime.meta_results import Known
from alignprop_fast.runtime.work import Call, Interval, Part, Work


class Counts:
    """Bytes and operators of one run, by part.

    Attributes:
        live: the mode to run under; it counts what is alive and its peaks.
        pool: counts what is offloaded.
        kept: bytes that the forward pass keeps for a backward pass; moved: bytes that it offloads.
        owned: storages that one block alone takes as its input.
        goes_back: whether the run has a backward pass.
    """

    def __init__(self, work: Work):
        self.live = LiveBytes(self._add_operator if work.is_counted else None, work.device)
        self.pool = CountedPool(work.device)
        self.kept: dict[Hashable, int] = {}
        self.moved: dict[Hashable, int] = {}
        self.owned: frozenset[int] = frozenset()
        self._operators: dict[Hashable, list[Operator]] = defaultdict(list)
        self.goes_back, self._output_kept = work.pull is not None, work.output_kept
        self._part: Hashable = None

    def enter(self, part: Part) -> None:
        self.moved[self._part] = self.pool.size_bytes - sum(self.moved.values())
        self.live.enter(part)
        self._part = part

    def take(self, tensors: Iterable[torch.Tensor], part: Part) -> None:
        self.live.take(tensors, part)

    def forward_done(self, out: torch.Tensor) -> None:
        self.owned = self.live.owned()
        if self.goes_back:
            self.kept.update(self.live.charged())
        if self.goes_back and not self._output_kept:
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


def intervals(
    calls: list[Call], counts: Counts, seconds: defaultdict[Hashable, Any], stands: Mapping[int, int]
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


def _gradients(counts: Counts, second: int) -> tuple[int, int]:
    """Bytes of the gradients of the leaves of the second of equal blocks, and by how much those that a block makes that
    does not run are smaller. (Gradients may be parts of larger tensors.)"""
    if not counts.goes_back:
        return 0, 0
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
