"""A plan: which gradient steps keep their activations, which are replayed, and which option each segment takes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from alignprop_fast.planner.block_option import EVERY_SEGMENT, BlockOption, Options
from alignprop_fast.planner.budget import format_bytes
from alignprop_fast.planner.cuda_graphs import GraphCosts, GraphUse
from alignprop_fast.planner.describe import by_group, ranges, summary


@dataclass(frozen=True)
class StageChoice:
    """The stage of the decoder or the reward, by name, and the option of each of its segments."""

    name: str
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How one training step runs. A plan changes time and memory, never the result.

    resident_steps: they keep their activations from the forward pass, under `resident_options` (one mapping from
        segment to option for each resident step, in the same order).
    replayed_steps: they keep only their input latents and run again in the backward pass, under `replay_options`.
    decoder, reward: stage and options; reward is None if the table has no reward.
    graphs: the evaluations that run as CUDA graphs, and graph_costs, what that saves.
    peak_bytes, seconds, host_bytes: predicted; zero if nothing was measured (no budget).
    phases: predicted bytes alive at the worst moment of each phase of the training step.
    kinds: predicted bytes at the peak by kind (fixed entries by name, latents, images, kept, transient); sums to it.
    budget_bytes: the budget that the plan was made for.
    exact: no plan within the budget is faster by the table. False if a large table was solved approximately, on a fine
        grid.
    """

    num_steps: int
    resident_steps: tuple[int, ...]
    replayed_steps: tuple[int, ...]
    resident_options: tuple[Options, ...] = ()
    replay_options: Options = field(default_factory=dict)
    decoder: StageChoice = StageChoice("image", {EVERY_SEGMENT: BlockOption.KEEP})
    reward: StageChoice | None = None
    graphs: GraphUse = GraphUse.NONE
    graph_costs: GraphCosts | None = None
    peak_bytes: int = 0
    seconds: float = 0.0
    host_bytes: int = 0
    phases: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    budget_bytes: int | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if len(self.resident_options) != len(self.resident_steps):
            raise ValueError("a plan needs one mapping of options for each resident step")

    def explain(self) -> str:
        """The plan in words: peak and budget, time, resident and replayed steps, peak by phase and kind of memory."""
        resident, replayed = len(self.resident_steps), len(self.replayed_steps)
        rest = self.num_steps - resident - replayed
        lines = [
            f"{self.num_steps} steps: {resident} resident{_which(self.resident_steps)}, "
            f"{replayed} replayed{_which(self.replayed_steps)}, {rest} without gradient",
            *self._option_lines(),
        ]
        if not self.phases:
            return "\n".join([*lines, "no memory budget: nothing was measured, the leanest way to run is used"])
        worst = max(self.phases, key=lambda phase: self.phases[phase])
        budget = "" if self.budget_bytes is None else f" of a budget of {format_bytes(self.budget_bytes)}"
        host = f", and {format_bytes(self.host_bytes)} of host memory" if self.host_bytes else ""
        groups = {name: size for name, size in by_group(self.kinds).items() if size}
        return "\n".join(
            [
                f"predicted peak {format_bytes(self.peak_bytes)}{budget}, reached in the phase '{worst}'{host}",
                f"predicted time {self.seconds:.2f} s a training step",
                *lines,
                "peak by phase: " + _sizes(self.phases),
                "alive at the peak: " + _sizes(groups),
            ]
        )

    def _graphs_in_words(self, costs: GraphCosts) -> str:
        sampling, replay = costs.sampling_ratio, costs.replay_ratio
        return f"{self.graphs} (in a graph an evaluation takes {sampling:.2f}, a replay {replay:.2f} of its time)"

    def _option_lines(self) -> list[str]:
        return [f"  {what}: {how}" for what, how in self.option_lines()]

    def option_lines(self) -> list[tuple[str, str]]:
        """("3 resident", "keep x 60 (transformer blocks)"), ...: the options of steps, decoder and reward in words."""
        resident = Counter(summary(options) for options in self.resident_options)
        lines = [(f"{count} resident", how) for how, count in resident.items()]
        if self.replayed_steps:
            lines.append((f"{len(self.replayed_steps)} replayed", summary(self.replay_options)))
        for what, stage in (("decoder", self.decoder), ("reward", self.reward)):
            if stage is not None:
                lines.append((what, f"by {stage.name}: {summary(stage.options)}"))
        if self.graph_costs is not None:
            lines.append(("CUDA graphs", self._graphs_in_words(self.graph_costs)))
        return lines


def leanest(num_steps: int, grad_steps: Sequence[int], graphs: GraphCosts | None = None) -> Plan:
    """The plan without budget: every gradient step replayed, the decoder one image at a time.

    A replay keeps only the attention outputs of its transformer blocks. That takes a sixth of the bytes, and no
    attention is computed twice. graphs: CUDA graphs are used where these say that they save time.
    """
    options = {EVERY_SEGMENT: BlockOption.ATTENTION} if grad_steps else {}
    use = GraphUse.NONE if graphs is None else graphs.fastest()
    return Plan(num_steps, (), tuple(grad_steps), replay_options=options, graphs=use, graph_costs=graphs)


def _which(steps: Sequence[int]) -> str:
    return f" ({ranges(steps)})" if steps else ""


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
