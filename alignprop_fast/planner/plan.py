"""A plan: which gradient steps keep their activations, which are replayed, and which option each segment takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from alignprop_fast.planner.budget import format_bytes


@dataclass(frozen=True)
class Plan:
    """How one chain runs. A plan changes time and memory, never the result.

    resident_steps: keep their activations from the forward pass, with `resident_options` per segment.
    replayed_steps: keep their input latents only and run again in the backward pass, with `replay_options` per segment.
    decoder_options: option per segment of the decoder.
    peak_bytes, seconds: predicted; zero where nothing was measured (no budget given).
    phases: predicted bytes alive at the worst moment of each phase of the training step.
    """

    num_steps: int
    resident_steps: tuple[int, ...]
    replayed_steps: tuple[int, ...]
    resident_options: Mapping[str, str] = field(default_factory=dict)
    replay_options: Mapping[str, str] = field(default_factory=dict)
    decoder_options: Mapping[str, str] = field(default_factory=dict)
    peak_bytes: int = 0
    seconds: float = 0.0
    phases: Mapping[str, int] = field(default_factory=dict)
    budget_bytes: int | None = None

    def explain(self) -> str:
        """The plan in words: what is kept, what is replayed, and where the peak lies."""
        resident, replayed = len(self.resident_steps), len(self.replayed_steps)
        lines = [
            f"{self.num_steps} steps: {resident} resident, {replayed} replayed, "
            f"{self.num_steps - resident - replayed} without gradient"
        ]
        for what, options in (
            ("resident steps", self.resident_options if resident else {}),
            ("replayed steps", self.replay_options if replayed else {}),
            ("decoder", self.decoder_options),
        ):
            lines += [f"  {what}: {segment} -> {option}" for segment, option in options.items()]
        if not self.phases:
            return "\n".join([*lines, "no memory budget: nothing measured, the leanest way of running is taken"])
        worst = max(self.phases, key=lambda phase: self.phases[phase])
        lines.append(f"predicted peak {format_bytes(self.peak_bytes)} in phase '{worst}', {self.seconds:.2f} s a step")
        lines += [f"  {phase}: {format_bytes(size_bytes)}" for phase, size_bytes in self.phases.items()]
        if self.budget_bytes is not None:
            lines.append(f"budget {format_bytes(self.budget_bytes)}")
        return "\n".join(lines)
