"""The cost table: what each part of a training step keeps, needs for a moment, and takes, under each option.

All bytes are of live tensors at one batch size, resolution and dtype, on one device. A training step runs the
denoising steps, the decoder, the reward, and the backward pass through them in reverse. Every part is an ordered chain
of segments; each takes one option. With P_j the kept bytes of the chosen options of segments 1 to j, a chain's peak
over what was alive before is max_j (P_j + transient_j): kept bytes so far, and transient ones on top.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from alignprop_fast.planner.block_option import BlockOption


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"no cost table: {what}; measure or estimate the table again")


def _require_costs(owner: str, sizes: Sequence[int], seconds: Sequence[float]) -> None:
    _require(all(isinstance(size, int) and size >= 0 for size in sizes), f"{owner}: bytes are whole and never negative")
    _require(
        all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in seconds),
        f"{owner}: seconds are finite and never negative",
    )


def _require_distinct(owner: str, names: Sequence[str]) -> None:
    _require(len(set(names)) == len(names), f"{owner}: a name stands twice")


@dataclass(frozen=True)
class Option:
    """One way to carry a segment from its forward to its backward pass.

    name: which one it is.
    kept_bytes: on the device from the segment's forward pass until its backward pass is done.
    transient_bytes: alive on top of all kept bytes up to and including this segment's own, at the worst moment of its
        forward or backward pass.
    seconds: forward, backward, whatever runs again, and transfers that nothing hides.
    host_bytes: kept in host memory instead (offload).
    """

    name: BlockOption
    kept_bytes: int
    transient_bytes: int
    seconds: float
    host_bytes: int = 0

    def __post_init__(self) -> None:
        _require_costs(f"option {self.name}", (self.kept_bytes, self.transient_bytes, self.host_bytes), (self.seconds,))


@dataclass(frozen=True)
class Segment:
    """A part of the network whose option can be chosen by itself."""

    name: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        _require(len(self.options) > 0, f"segment {self.name} has no option")
        _require_distinct(f"segment {self.name}", [option.name for option in self.options])

    def option(self, name: BlockOption) -> Option:
        """The option of this name.

        Raises:
            ValueError: there is none; names those there are.
        """
        for option in self.options:
            if option.name == name:
                return option
        names = ", ".join(option.name for option in self.options)
        raise ValueError(f"segment {self.name} has no option {name}: choose one of {names}")


@dataclass(frozen=True)
class Stage:
    """One way to run the decoder, or the reward: all of the batch at once, or piece by piece in the backward pass.

    name: "batch", "image", "chunk:2", ...
    segments: of one run.
    runs: runs that make up the batch (images or chunks); one unless replayed.
    replayed: the forward pass keeps no graph; the backward pass takes one run after another forward again and back.
    forward_bytes: replayed only: transient bytes of the forward pass without graph.
    forward_seconds: replayed only: the forward passes of all runs without graph.
    """

    name: str
    segments: tuple[Segment, ...]
    runs: int = 1
    replayed: bool = False
    forward_bytes: int = 0
    forward_seconds: float = 0.0

    def __post_init__(self) -> None:
        owner = f"stage {self.name}"
        _require_costs(owner, (self.forward_bytes, self.runs), (self.forward_seconds,))
        _require(
            self.runs == 1 or (self.replayed and self.runs > 1), f"{owner}: only a replayed stage has several runs"
        )
        _require_distinct(owner, [segment.name for segment in self.segments])


@dataclass(frozen=True)
class CostTable:
    """Costs of one training step at one batch size, resolution and dtype, on one device.

    fixed: bytes that are always there, by name: weights, adapters, gradients, optimizer, workspace.
    latent_bytes: input latents of one gradient step; every gradient step keeps them, resident or not, and the running
        state takes two more.
    image_bytes: the images, alive from the decoder on until the end of the step.
    step: segments of one denoising step that carries gradient.
    sampling_bytes, sampling_seconds: one denoising step without gradient: transient bytes, time.
    sums_bytes: the sums of the gradients over the steps, alive in the steps' backward passes where several carry one.
    transfer_bytes: what one block's tensors take on their way to host memory or back beside a neighbour's worst moment,
        on top of a step's transient bytes under plans that offload.
    decoders, rewards: alternatives. Without rewards (no reward known) the reward takes reserve_bytes for a moment.
    optimizer_seconds: one update.
    host_limit_bytes: most that offloading may take of the host's memory; None for no limit.
    origin: where the table is from: model, shapes, dtype, device, package version, source ("measured", "estimated").
    """

    fixed: Mapping[str, int]
    latent_bytes: int
    image_bytes: int
    step: tuple[Segment, ...]
    sampling_bytes: int
    sampling_seconds: float
    decoders: tuple[Stage, ...]
    rewards: tuple[Stage, ...] = ()
    reserve_bytes: int = 0
    optimizer_seconds: float = 0.0
    sums_bytes: int = 0
    transfer_bytes: int = 0
    host_limit_bytes: int | None = None
    origin: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [*self.fixed.values(), self.latent_bytes, self.image_bytes, self.sampling_bytes]
        sizes += [self.reserve_bytes, self.sums_bytes, self.transfer_bytes]
        _require_costs("table", [*sizes, self.host_limit_bytes or 0], (self.sampling_seconds, self.optimizer_seconds))
        _require(len(self.decoders) > 0, "no decoder")
        _require_distinct("step", [segment.name for segment in self.step])
        _require_distinct("decoders", [stage.name for stage in self.decoders])
        _require_distinct("rewards", [stage.name for stage in self.rewards])

    def sums_of(self, grad_steps: int) -> int:
        """Bytes of the sums of so many steps' gradients; a single step's gradient is its own sum."""
        return self.sums_bytes if grad_steps > 1 else 0

    def base_bytes(self, grad_steps: int) -> int:
        """Bytes alive all through a training step with this many gradient steps."""
        return sum(self.fixed.values()) + self.latent_bytes * (2 + grad_steps)
