"""The cost table: the kept bytes, transient bytes and seconds of each part of a training step under each option.

All bytes are those of live tensors at one batch size, resolution and dtype, on one device. A training step runs the
denoising steps, the decoder, the reward, and then the backward pass through them in reverse. Every part is an ordered
chain of segments, and each segment takes one option. Let P_j be the kept bytes of the chosen options of segments 1 to
j. Then the chain adds at most max_j (P_j + transient_j) bytes: the kept bytes so far plus the transient ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from alignprop_fast.planner.block_option import BlockOption
from alignprop_fast.planner.cuda_graphs import GraphCosts, GraphUse
from alignprop_fast.planner.operators import Operators

# Numbers, or `Operators` in a table for any GPU.
Seconds = TypeVar("Seconds")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"no cost table: {what}; measure or estimate the table again")


def _require_costs(owner: str, sizes: Sequence[int], seconds: Sequence[Any]) -> None:
    _require(all(isinstance(size, int) and size >= 0 for size in sizes), f"{owner}: bytes are whole and never negative")
    _require(all(map(_is_time, seconds)), f"{owner}: seconds are finite and never negative")


def _is_time(value: Any) -> bool:
    if isinstance(value, Operators):
        return True
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _require_distinct(owner: str, names: Sequence[str]) -> None:
    _require(len(set(names)) == len(names), f"{owner}: a name appears twice")


@dataclass(frozen=True)
class Option(Generic[Seconds]):
    """One way to carry a segment from its forward to its backward pass.

    name: which one it is.
    kept_bytes: kept on the device from the segment's forward pass to the end of its backward pass.
    transient_bytes: further bytes at the worst moment of its forward or backward pass, beside all kept bytes up to and
        including its own.
    seconds: forward, backward, recomputation, and transfers that no computation hides.
    host_bytes: kept in host memory instead (offload).
    """

    name: BlockOption
    kept_bytes: int
    transient_bytes: int
    seconds: Seconds
    host_bytes: int = 0

    def __post_init__(self) -> None:
        _require_costs(f"option {self.name}", (self.kept_bytes, self.transient_bytes, self.host_bytes), (self.seconds,))

    def with_copies(self: "Option[float]", link: float) -> "Option[float]":
        """With the seconds of copies that its computation does not hide. About a third of it is forward, the rest
        backward. link: bytes/s to host memory."""
        copy_seconds = self.host_bytes / link
        exposed = max(copy_seconds - self.seconds / 3, 0) + max(copy_seconds - self.seconds * 2 / 3, 0)
        return replace(self, seconds=self.seconds + exposed)


@dataclass(frozen=True)
class Segment(Generic[Seconds]):
    """A part of the network with an option of its own."""

    name: str
    options: tuple[Option[Seconds], ...]

    def __post_init__(self) -> None:
        _require(len(self.options) > 0, f"segment {self.name} has no option")
        _require_distinct(f"segment {self.name}", [option.name for option in self.options])

    def option(self, name: BlockOption) -> Option[Seconds]:
        """The option of this name.

        Raises:
            ValueError: there is no such option; the message lists the names.
        """
        for option in self.options:
            if option.name == name:
                return option
        names = ", ".join(option.name for option in self.options)
        raise ValueError(f"segment {self.name} has no option {name}: choose one of {names}")


@dataclass(frozen=True)
class Stage(Generic[Seconds]):
    """One way to run the decoder or the reward: the whole batch at once, or piece by piece in the backward pass.

    name: "batch", "image", "chunk:2", ...
    segments: of one run.
    runs: number of runs for the batch (images or chunks); one unless replayed.
    replayed: the forward pass keeps no graph; the backward pass runs each piece forward again and then backward.
    forward_bytes: if replayed, transient bytes of the forward pass without graph.
    forward_seconds: if replayed, seconds of all forward passes without graph.
    """

    name: str
    segments: tuple[Segment[Seconds], ...]
    runs: int = 1
    replayed: bool = False
    forward_bytes: int = 0
    forward_seconds: Seconds | float = 0.0

    def __post_init__(self) -> None:
        owner = f"stage {self.name}"
        _require_costs(owner, (self.forward_bytes, self.runs), (self.forward_seconds,))
        _require(
            self.runs == 1 or (self.replayed and self.runs > 1), f"{owner}: only a replayed stage has several runs"
        )
        _require_distinct(owner, [segment.name for segment in self.segments])


@dataclass(frozen=True)
class CostTable(Generic[Seconds]):
    """Costs of one training step at one batch size, resolution and dtype, on one device.

    fixed: bytes that are always alive, by name: weights, adapters, gradients, optimizer, workspace.
    latent_bytes: input latents of one gradient step. Every gradient step keeps them, resident or not, and the running
        state takes twice as many.
    image_bytes: the images, alive from the decoder to the end of the step.
    step: segments of one denoising step that carries gradient.
    sampling_bytes, sampling_seconds: transient bytes and seconds of one evaluation without gradient. The forward pass
        of a replayed step is one.
    closed_bytes, closed_seconds: the same of a step that carries no gradient, if it is approximated; else None.
    sums_bytes: the sums of the gradients over the steps, alive in the steps' backward passes if several carry gradient.
    transfer_bytes: tensors of one block in transfer to or from host memory during a neighbour's worst moment, added to
        a step's transient bytes in plans that offload.
    decoders, rewards: alternatives. Without rewards (no reward known) the reward takes reserve_bytes for a moment.
    optimizer_seconds: seconds of one update.
    host_limit_bytes: the most host memory that offloading may take; None for no limit.
    graphs: what CUDA graphs save and take; None: plans use none.
    origin: model, shapes, dtype, device, package version and source ("measured", "estimated") of the table.
    """

    fixed: Mapping[str, int]
    latent_bytes: int
    image_bytes: int
    step: tuple[Segment[Seconds], ...]
    sampling_bytes: int
    sampling_seconds: Seconds
    decoders: tuple[Stage[Seconds], ...]
    rewards: tuple[Stage[Seconds], ...] = ()
    reserve_bytes: int = 0
    optimizer_seconds: float = 0.0
    sums_bytes: int = 0
    transfer_bytes: int = 0
    host_limit_bytes: int | None = None
    closed_bytes: int | None = None
    closed_seconds: Seconds | None = None
    graphs: GraphCosts | None = None
    origin: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [*self.fixed.values(), self.latent_bytes, self.image_bytes, self.sampling_bytes]
        sizes += [self.reserve_bytes, self.sums_bytes, self.transfer_bytes]
        sizes += [self.host_limit_bytes or 0, self.closed_bytes or 0]
        seconds = (self.sampling_seconds, self.closed_seconds or 0.0, self.optimizer_seconds)
        _require_costs("table", sizes, seconds)
        _require(len(self.decoders) > 0, "no decoder")
        _require_distinct("step", [segment.name for segment in self.step])
        _require_distinct("decoders", [stage.name for stage in self.decoders])
        _require_distinct("rewards", [stage.name for stage in self.rewards])

    def with_copies(self: "CostTable[float]", link: float) -> "CostTable[float]":
        """The table with the seconds of copies that no computation hides. link: bytes/s to host memory."""
        step = (replace(s, options=tuple(option.with_copies(link) for option in s.options)) for s in self.step)
        return replace(self, step=tuple(step))

    @property
    def closed(self) -> tuple[int, Seconds]:
        """Transient bytes and seconds of one denoising step that carries no gradient."""
        if self.closed_bytes is None or self.closed_seconds is None:
            return self.sampling_bytes, self.sampling_seconds
        return self.closed_bytes, self.closed_seconds

    def sums_of(self, grad_steps: int) -> int:
        """Bytes of the sums of this number of steps' gradients; zero for one step, whose gradient is its own sum."""
        return self.sums_bytes if grad_steps > 1 else 0

    def sampling_seconds_of(self: "CostTable[float]", use: GraphUse) -> float:
        """Seconds of one evaluation without gradient."""
        ratio = self.graphs.sampling_ratio if self.graphs is not None and use.sampling else 1.0
        return ratio * self.sampling_seconds

    def closed_seconds_of(self: "CostTable[float]", use: GraphUse) -> float:
        """Seconds of one denoising step that carries no gradient. Graphs are assumed to save the same share of it."""
        ratio = self.graphs.sampling_ratio if self.graphs is not None and use.sampling else 1.0
        return ratio * self.closed[1]

    def replay_ratio_of(self, use: GraphUse) -> float:
        """Seconds of a replayed step over those of its segments."""
        return self.graphs.replay_ratio if self.graphs is not None and use.replays else 1.0

    def pool_bytes(self, use: GraphUse, replay_bytes: int) -> int:
        """Bytes that the graphs keep reserved during all of a training step: those of the largest one, as they never
        run at the same time, and what is static.

        replay_bytes: kept and transient bytes of one replayed step; 0 if there is none.
        """
        if self.graphs is None or not use.sampling:
            return 0
        return self.graphs.static_bytes + max(self.sampling_bytes, self.closed[0], replay_bytes if use.replays else 0)

    def base_bytes(self, grad_steps: int) -> int:
        """Bytes alive during all of a training step with this number of gradient steps."""
        return sum(self.fixed.values()) + self.latent_bytes * (2 + grad_steps)
