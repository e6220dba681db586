"""Simulates a training step under a plan, moment by moment. Every prediction of a plan comes from here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from alignprop_fast.planner.block_option import Options, option_of
from alignprop_fast.planner.plan import Plan, StageChoice
from alignprop_fast.planner.table import CostTable, Option, Segment, Stage

PHASES = ("sampling", "decoder", "reward", "resident steps", "replayed steps")
# For a kept stage only the sum of forward and backward seconds is known. A backward pass of matrix products without
# gradients of weights costs about as much as the forward pass. The share only places moments in time.
FORWARD_SHARE = 0.5


@dataclass(frozen=True)
class Moment:
    """One part of the training step.

    phase: one of `PHASES`.
    label: "step 37 backward", "decoder", ...
    kinds: bytes at its worst moment by kind: fixed entries by name, latents, images, kept, transient.
    resting_bytes: bytes alive at its end.
    start_seconds: seconds from the start of the training step.
    seconds: its duration.
    """

    phase: str
    label: str
    kinds: Mapping[str, int]
    resting_bytes: int
    start_seconds: float
    seconds: float

    @property
    def bytes(self) -> int:
        """Bytes alive at its worst moment."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class _Chain:
    """The chosen options of a chain: kept and transient bytes at its peak, all kept bytes, seconds, host bytes."""

    kept_at_peak: int
    transient: int
    kept: int
    seconds: float
    host: int

    @classmethod
    def of(cls, segments: Sequence[Segment], options: Options) -> "_Chain":
        chosen: list[Option] = [segment.option(option_of(options, segment.name)) for segment in segments]
        kept, worst = 0, (0, 0)
        for option in chosen:
            kept += option.kept_bytes
            worst = max(worst, (kept, option.transient_bytes), key=sum)
        return cls(*worst, kept, sum(o.seconds for o in chosen), sum(o.host_bytes for o in chosen))


@dataclass(frozen=True)
class _Part:
    """The decoder or the reward: the bytes that its forward and backward pass add."""

    forward: tuple[int, int]  # kept and transient bytes at the worst moment
    backward: tuple[int, int]
    kept: int  # between its forward and its backward pass
    forward_seconds: float
    backward_seconds: float
    host: int

    @classmethod
    def of(cls, stages: Sequence[Stage], choice: StageChoice | None, reserve_bytes: int = 0) -> "_Part":
        if choice is None:
            return cls((0, reserve_bytes), (0, reserve_bytes), 0, 0.0, 0.0, 0)
        stage = find_stage(stages, choice.name)
        run = _Chain.of(stage.segments, choice.options)
        peak = (run.kept_at_peak, run.transient)
        if stage.replayed:
            seconds = stage.runs * run.seconds
            return cls((0, stage.forward_bytes), peak, 0, stage.forward_seconds, seconds, run.host)
        forward = FORWARD_SHARE * run.seconds
        return cls(peak, peak, run.kept, forward, run.seconds - forward, run.host)


def find_stage(stages: Sequence[Stage], name: str) -> Stage:
    """The stage of this name.

    Raises:
        ValueError: there is no such stage; the message lists the names.
    """
    for stage in stages:
        if stage.name == name:
            return stage
    raise ValueError(f"the cost table has no stage {name}: choose one of {', '.join(s.name for s in stages) or 'none'}")


def simulate(table: CostTable, plan: Plan) -> list[Moment]:
    """The moments of a training step under the plan in order of time, one for each forward and each backward pass.

    Only sums of forward and backward seconds are known. A step's forward pass is assumed to take as long as a step
    without gradient.

    Raises:
        ValueError: the plan names an option or a stage that the table lacks.
    """
    return list(_Walk(table, plan).moments())


class _Walk:
    """Walks through a training step and tracks the bytes alive and the time."""

    def __init__(self, table: CostTable, plan: Plan):
        self.table, self.plan = table, plan
        self.now = 0.0
        self.kept = 0
        self.images = 0
        grad_steps = len(plan.resident_steps) + len(plan.replayed_steps)
        self.latents = table.latent_bytes * (2 + grad_steps)
        self.sums = table.sums_of(grad_steps)
        self.residents = [_Chain.of(table.step, options) for options in plan.resident_options]
        self.replay = _Chain.of(table.step if plan.replayed_steps else (), plan.replay_options)
        own = self.replay.kept_at_peak + self.replay.transient
        pool_bytes = table.pool_bytes(plan.graphs, own)
        self.fixed = {**table.fixed, "graphs": pool_bytes} if pool_bytes else table.fixed
        self.transfer = table.transfer_bytes if any(chain.host for chain in (*self.residents, self.replay)) else 0
        self.decoder = _Part.of(table.decoders, plan.decoder)
        self.reward = _Part.of(table.rewards, plan.reward, table.reserve_bytes)

    def moment(
        self, phase: str, label: str, peak: tuple[int, int], seconds: float, kept_after: int, sums: int = 0
    ) -> Moment:
        """Add a moment. peak: the kept and transient bytes it adds. kept_after: all kept bytes at its end."""
        kinds = {
            **self.fixed,
            "gradients": self.fixed.get("gradients", 0) + sums,
            "latents": self.latents,
            "images": self.images,
            "kept": self.kept + peak[0],
            "transient": peak[1],
        }
        start, self.now, self.kept = self.now, self.now + seconds, kept_after
        resting = sum(self.fixed.values()) + sums + self.latents + self.images + kept_after
        return Moment(phase, label, kinds, resting, start, seconds)

    def moments(self) -> Iterator[Moment]:
        yield from self._sampling()
        decoder, reward, before = self.decoder, self.reward, self.kept
        self.images = self.table.image_bytes
        yield self.moment("decoder", "decoder", decoder.forward, decoder.forward_seconds, before + decoder.kept)
        decoded = self.kept
        yield self.moment("reward", "reward", reward.forward, reward.forward_seconds, decoded + reward.kept)
        self.kept = decoded
        yield self.moment("reward", "reward backward", reward.backward, reward.backward_seconds, decoded)
        self.kept = before
        yield self.moment("decoder", "decoder backward", decoder.backward, decoder.backward_seconds, before)
        yield from self._backward()

    def _sampling(self) -> Iterator[Moment]:
        residents = dict(zip(self.plan.resident_steps, self.residents, strict=True))
        for step in range(self.plan.num_steps):
            if step in residents:
                chain = residents[step]
                seconds = min(self.table.sampling_seconds, chain.seconds)
                peak = (chain.kept_at_peak, chain.transient + self.transfer)
                yield self.moment("resident steps", f"step {step}", peak, seconds, self.kept + chain.kept)
            else:
                use, replayed = self.plan.graphs, step in self.plan.replayed_steps
                size_bytes = self.table.sampling_bytes if replayed else self.table.closed[0]
                seconds = (self.table.sampling_seconds_of if replayed else self.table.closed_seconds_of)(use)
                peak = (0, 0 if use.sampling else size_bytes)
                yield self.moment("sampling", f"step {step}", peak, seconds, self.kept)

    def _backward(self) -> Iterator[Moment]:
        for step, chain in zip(reversed(self.plan.resident_steps), reversed(self.residents), strict=True):
            self.kept -= chain.kept
            seconds = chain.seconds - min(self.table.sampling_seconds, chain.seconds)
            peak = (chain.kept_at_peak, chain.transient + self.transfer)
            yield self.moment("resident steps", f"step {step} backward", peak, seconds, self.kept, self.sums)
        seconds = self.replay.seconds * self.table.replay_ratio_of(self.plan.graphs)
        own = (0, 0) if self.plan.graphs.replays else (self.replay.kept_at_peak, self.replay.transient)
        peak = (own[0], own[1] + self.transfer)
        for step in reversed(self.plan.replayed_steps):
            label = f"step {step} replayed"
            yield self.moment("replayed steps", label, peak, seconds, self.kept, self.sums)

    def host_bytes(self) -> int:
        """The most bytes in host memory at once: of resident steps, decoder and reward, or of one replayed step."""
        residents = sum(chain.host for chain in self.residents)
        return max(residents + self.decoder.host + self.reward.host, self.replay.host)


def scoring_seconds(table: CostTable, plan: Plan) -> float:
    """Seconds to decode and score the images of a batch without gradient."""
    decoder, reward = _Part.of(table.decoders, plan.decoder), _Part.of(table.rewards, plan.reward)
    return decoder.forward_seconds + reward.forward_seconds


def price(table: CostTable, plan: Plan) -> Plan:
    """The same plan with the table's predictions: peak, seconds, host bytes, phases and kinds.

    Raises:
        ValueError: the plan names an option or a stage that the table lacks.
    """
    walk = _Walk(table, plan)
    moments = list(walk.moments())
    worst = max(moments, key=lambda moment: moment.bytes)
    phases = {
        phase: max(moment.bytes for moment in moments if moment.phase == phase)
        for phase in PHASES
        if any(moment.phase == phase for moment in moments)
    }
    return replace(
        plan,
        graph_costs=table.graphs,
        peak_bytes=worst.bytes,
        seconds=walk.now + table.optimizer_seconds,
        host_bytes=walk.host_bytes(),
        phases=phases,
        kinds={name: size for name, size in worst.kinds.items() if size},
    )
