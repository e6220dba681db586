"""A cost table with operators in place of seconds, and the seconds that they take on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

from alignprop_fast.planner.cuda_graphs import GraphCosts
from alignprop_fast.planner.gpus import GRAPH_LAUNCH_SECONDS, LAUNCH_SECONDS, Gpu, roofline_seconds
from alignprop_fast.planner.operators import Operator, Operators
from alignprop_fast.planner.table import CostTable, Segment, Stage


@dataclass(frozen=True)
class CountedGraphs:
    """CUDA graphs of a step before its seconds are known.

    static_bytes: as in `GraphCosts`. replays: whether replayed steps can run as graphs. most_ratio: larger ratios count
    as this one.
    """

    static_bytes: int
    replays: bool
    most_ratio: float = 1.0


@dataclass(frozen=True)
class CountedReward:
    """The costs of scoring a batch of pictures on any GPU. weight_bytes: of the reward's networks."""

    stages: tuple[Stage[Operators], ...]
    weight_bytes: int


@dataclass(frozen=True)
class CountedTable:
    """The costs of one training step on any GPU. graphs: None: it uses none."""

    costs: CostTable[Operators]
    graphs: CountedGraphs | None = None

    def scored_by(self, reward: CountedReward) -> CountedTable:
        """The costs with those of a reward, in place of what it had."""
        fixed = {**self.costs.fixed, "reward": reward.weight_bytes}
        return replace(self, costs=replace(self.costs, rewards=reward.stages, fixed=fixed))

    def on(self, gpu: Gpu) -> CostTable[float]:
        """The costs on a GPU by the roofline model."""
        costs, seconds = self.costs, seconds_on(gpu)
        timed: Any = replace(
            cast(Any, costs),
            step=_segments(costs.step, seconds),
            sampling_seconds=seconds(costs.sampling_seconds),
            closed_seconds=None if costs.closed_seconds is None else seconds(costs.closed_seconds),
            decoders=_stages(costs.decoders, seconds),
            rewards=_stages(costs.rewards, seconds),
            graphs=self._graphs(gpu),
            origin={**costs.origin, "device": gpu.name},
        )
        return timed.with_copies(gpu.link)

    def _graphs(self, gpu: Gpu) -> GraphCosts | None:
        if self.graphs is None:
            return None
        plain, in_graphs = seconds_on(gpu), seconds_on(gpu, GRAPH_LAUNCH_SECONDS)

        def ratio(operators: Operators) -> float:
            return in_graphs(operators) / plain(operators) if plain(operators) else 1.0

        sampling = ratio(self.costs.sampling_seconds)
        replay = ratio(_leanest(self.costs.step)) if self.graphs.replays else 1.0
        most = self.graphs.most_ratio
        return GraphCosts(min(sampling, most), min(replay, most), self.graphs.static_bytes)


def seconds_on(gpu: Gpu, launch_seconds: float = LAUNCH_SECONDS) -> Callable[[Operators], float]:
    """A function that gives the estimated seconds of operators on the GPU. launch_seconds: of one kernel."""

    @cache
    def of_one(operator: Operator) -> float:
        flop, size_bytes, dtype = operator
        return roofline_seconds(flop, size_bytes, gpu, dtype, launch_seconds=launch_seconds)

    return lambda operators: operators.seconds(of_one)


def _leanest(step: Iterable[Segment[Operators]]) -> Operators:
    """Those of a step in which each block keeps least."""
    total = Operators()
    for segment in step:
        total += min(segment.options, key=lambda option: option.kept_bytes + option.host_bytes).seconds
    return total


def _segments(segments: Iterable[Segment[Operators]], seconds: Callable[[Operators], float]) -> Any:
    return tuple(
        replace(segment, options=tuple(replace(cast(Any, o), seconds=seconds(o.seconds)) for o in segment.options))
        for segment in segments
    )


def _stages(stages: Iterable[Stage[Operators]], seconds: Callable[[Operators], float]) -> Any:
    def forward(stage: Stage[Operators]) -> float:
        known = stage.forward_seconds
        return seconds(known) if isinstance(known, Operators) else known

    return tuple(
        replace(stage, segments=_segments(stage.segments, seconds), forward_seconds=forward(stage)) for stage in stages
    )
