"""The cost table at another batch size, and the largest batch within a budget."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from alignprop_fast.planner.cuda_graphs import GraphCosts
from alignprop_fast.planner.solve import Solver
from alignprop_fast.planner.table import CostTable, Option, Segment, Stage

MOST_BATCH = 1024
_REMEDY = "take both from the same model"

Alternative = TypeVar("Alternative", Option, Stage)


@dataclass(frozen=True)
class _Line:
    """The line through two values, read at a third batch size."""

    at: float  # 0 at the first table's batch size, 1 at the second's

    def seconds(self, first: float, second: float) -> float:
        return max(0.0, first + (second - first) * self.at)

    def size(self, first: int, second: int) -> int:
        return math.ceil(round(self.seconds(first, second), 3))

    def runs(self, first: int, second: int) -> int:
        return max(1, self.size(first, second))

    def maybe(self, line: Callable[[Any, Any], Any], first: Any, second: Any) -> Any:
        """The value on the line, if both tables have one."""
        return None if first is None or second is None else line(first, second)

    def sizes(self, first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
        _require_equal("fixed entries", list(first), list(second))
        return {name: self.size(first[name], second[name]) for name in first}

    def graphs(self, first: GraphCosts | None, second: GraphCosts | None) -> GraphCosts | None:
        if first is None or second is None:
            return None
        return GraphCosts(
            self.ratio(first.sampling_ratio, second.sampling_ratio),
            self.ratio(first.replay_ratio, second.replay_ratio),
            self.size(first.static_bytes, second.static_bytes),
        )

    def ratio(self, first: float, second: float) -> float:
        """It stays near the two further out: a large batch does not wait for launches."""
        return min(max(self.seconds(first, second), min(first, second)), max(first, second, 1.0))

    def segments(self, first: Sequence[Segment], second: Sequence[Segment]) -> tuple[Segment, ...]:
        _require_equal("segments", [segment.name for segment in first], [segment.name for segment in second])
        return tuple(
            Segment(one.name, self.options(one.name, one.options, two.options))
            for one, two in zip(first, second, strict=True)
        )

    def options(self, owner: str, first: Sequence[Option], second: Sequence[Option]) -> tuple[Option, ...]:
        return tuple(
            Option(
                one.name,
                self.size(one.kept_bytes, two.kept_bytes),
                self.size(one.transient_bytes, two.transient_bytes),
                self.seconds(one.seconds, two.seconds),
                self.size(one.host_bytes, two.host_bytes),
            )
            for one, two in _in_both(f"option of {owner}", first, second)
        )

    def stages(self, first: Sequence[Stage], second: Sequence[Stage]) -> tuple[Stage, ...]:
        return tuple(
            replace(
                one,
                segments=self.segments(one.segments, two.segments),
                runs=self.runs(one.runs, two.runs),
                forward_bytes=self.size(one.forward_bytes, two.forward_bytes),
                forward_seconds=self.seconds(one.forward_seconds, two.forward_seconds),
            )
            for one, two in _in_both("stage", first, second)
        )


def _in_both(
    what: str, first: Sequence[Alternative], second: Sequence[Alternative]
) -> list[tuple[Alternative, Alternative]]:
    """Pairs of the same name. Options that do not fit or do not apply at one batch size are in only one table."""
    named = {two.name: two for two in second}
    pairs = [(one, named[one.name]) for one in first if one.name in named]
    if not pairs and (first or second):
        raise ValueError(f"two cost tables with no {what} in common cannot be interpolated: {_REMEDY}")
    return pairs


def _require_equal(what: str, first: Sequence, second: Sequence) -> None:
    if first != second:
        raise ValueError(f"two cost tables with different {what} cannot be interpolated: {_REMEDY}")


def scaled(table_1: CostTable, table_2: CostTable, batch_1: int, batch_2: int, batch: int) -> CostTable:
    """The cost table at another batch size, on the line through two tables.

    Every cost is a constant plus a share per image, so two tables determine it. Bytes are rounded up, and nothing falls
    below zero. Options and stages that are in only one table are left out.

    Raises:
        ValueError: the tables have different segments, no option or stage in common, or equal batch sizes.
    """
    if batch_1 == batch_2:
        raise ValueError(f"two cost tables at batch size {batch_1} give no line: take the second at another size")
    line = _Line((batch - batch_1) / (batch_2 - batch_1))
    one, two = table_1, table_2
    return replace(
        one,
        fixed=line.sizes(one.fixed, two.fixed),
        latent_bytes=line.size(one.latent_bytes, two.latent_bytes),
        image_bytes=line.size(one.image_bytes, two.image_bytes),
        step=line.segments(one.step, two.step),
        sampling_bytes=line.size(one.sampling_bytes, two.sampling_bytes),
        sampling_seconds=line.seconds(one.sampling_seconds, two.sampling_seconds),
        closed_bytes=line.maybe(line.size, one.closed_bytes, two.closed_bytes),
        closed_seconds=line.maybe(line.seconds, one.closed_seconds, two.closed_seconds),
        decoders=line.stages(one.decoders, two.decoders),
        rewards=line.stages(one.rewards, two.rewards),
        reserve_bytes=line.size(one.reserve_bytes, two.reserve_bytes),
        transfer_bytes=line.size(one.transfer_bytes, two.transfer_bytes),
        optimizer_seconds=line.seconds(one.optimizer_seconds, two.optimizer_seconds),
        graphs=line.graphs(one.graphs, two.graphs),
        origin={**one.origin, "batch_size": str(batch)},
    )


def largest_batch(
    table_of_batch: Callable[[int], CostTable], num_steps: int, grad_steps: int, budget_bytes: int
) -> int:
    """The largest batch size (at most 1024) that has a plan within the budget; 0 if not even one image fits.

    The search looks first for the largest batch that the leanest options fit, which is quick to see.

    Args:
        table_of_batch: the cost table at a batch size; its bytes must not fall as the batch grows.
        grad_steps: number of gradient steps.
    """

    def solver(batch: int) -> Solver:
        return Solver(table_of_batch(batch), num_steps, grad_steps)

    most = _largest(lambda batch: solver(batch).may_fit(grad_steps, budget_bytes), 1, MOST_BATCH)
    return _largest(lambda batch: solver(batch).fits(grad_steps, budget_bytes), most, most)


def _largest(fits: Callable[[int], bool], first: int, most: int) -> int:
    """The largest number up to `most` that fits, 0 if none does. The search tries `first`, doubles, then bisects."""
    low, high, number = 0, most + 1, first
    while high - low > 1:
        if fits(number):
            low = number
        else:
            high = number
        number = low * 2 if high > most and low * 2 <= most else (low + high) // 2
    return low
