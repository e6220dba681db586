"""CUDA graphs in a plan: which evaluations run as graphs, what that saves, and what it keeps reserved."""

from dataclasses import dataclass
from enum import StrEnum


class GraphUse(StrEnum):
    """The evaluations that run as CUDA graphs. Resident steps never do: their activations outlive the evaluation."""

    NONE = "none"
    SAMPLING = "evaluations without gradient"
    ALL = "evaluations without gradient and replays"

    @property
    def sampling(self) -> bool:
        return self is not GraphUse.NONE

    @property
    def replays(self) -> bool:
        """Whether a replayed step runs as one graph, forward and back. Those that offload run without it."""
        return self is GraphUse.ALL


@dataclass(frozen=True)
class GraphCosts:
    """What CUDA graphs save and take, beside a table's own costs.

    sampling_ratio: seconds of an evaluation without gradient as a graph, over those of one launched kernel by kernel.
    replay_ratio: the same of a replayed step, forward and back.
    static_bytes: inputs and results of the graphs, which they keep beside the memory of the largest one.
    """

    sampling_ratio: float
    replay_ratio: float
    static_bytes: int

    def __post_init__(self) -> None:
        if not (self.sampling_ratio > 0 and self.replay_ratio > 0 and self.static_bytes >= 0):
            raise ValueError(
                "no costs of CUDA graphs: ratios are positive and bytes never negative; measure them again"
            )

    def fastest(self) -> GraphUse:
        """The use that saves most where memory does not matter."""
        if self.sampling_ratio >= 1:
            return GraphUse.NONE
        return GraphUse.ALL if self.replay_ratio < 1 else GraphUse.SAMPLING
