"""The fastest plan within a budget, by enumeration: exact for tables of few segments and options."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from alignprop_fast.planner.budget import BudgetInfeasible
from alignprop_fast.planner.plan import Plan
from alignprop_fast.planner.table import CostTable, Option, Segment

Choice = tuple[Option, ...]


def leanest(num_steps: int, grad_steps: Sequence[int]) -> Plan:
    """The plan for no budget and no measurements: every gradient step replayed, the decoder one image at a time.

    A replay keeps of its transformer blocks the attention outputs alone: a sixth of the bytes, and no attention twice.
    """
    replay = {"step": "attention"} if grad_steps else {}
    return Plan(num_steps, (), tuple(grad_steps), replay_options=replay, decoder_options={"decoder": "image"})


def _choices(segments: tuple[Segment, ...]) -> list[Choice]:
    return list(product(*(segment.options for segment in segments)))


def _names(segments: tuple[Segment, ...], choice: Choice) -> dict[str, str]:
    return {segment.name: option.name for segment, option in zip(segments, choice, strict=True)}


def _kept(choice: Choice) -> int:
    return sum(option.kept_bytes for option in choice)


def _transient(choice: Choice) -> int:
    return max((option.transient_bytes for option in choice), default=0)


def _phases(table: CostTable, resident: int, replayed: int, keep: Choice, replay: Choice, decode: Choice) -> dict:
    """Bytes alive at the worst moment of each phase, in the order of time.

    Resident steps are the last of the chain: the backward pass frees them before the first replay begins.
    """
    base = table.fixed_bytes + table.latent_bytes * (2 + resident + replayed)
    kept = resident * _kept(keep)
    phases = {
        "sampling": base + max(kept - _kept(keep), 0) + table.sampling_bytes,
        "decode": base + kept + _kept(decode) + _transient(decode),
        "reward": base + kept + _kept(decode) + table.reward_bytes,
    }
    if resident:
        phases["resident steps"] = base + kept + _transient(keep)
    if replayed:
        phases["replayed steps"] = base + _kept(replay) + _transient(replay)
    return phases


def _candidates(table: CostTable, num_steps: int, grad_steps: Sequence[int]) -> Iterator[Plan]:
    steps, decoders = _choices(table.step), _choices(table.decoder)
    for resident, keep, replay, decode in product(range(len(grad_steps) + 1), steps, steps, decoders):
        replayed = len(grad_steps) - resident
        phases = _phases(table, resident, replayed, keep, replay, decode)
        yield Plan(
            num_steps,
            resident_steps=tuple(grad_steps[replayed:]),
            replayed_steps=tuple(grad_steps[:replayed]),
            resident_options=_names(table.step, keep) if resident else {},
            replay_options=_names(table.step, replay) if replayed else {},
            decoder_options=_names(table.decoder, decode),
            peak_bytes=max(phases.values()),
            seconds=(num_steps - resident) * table.sampling_seconds
            + resident * sum(option.seconds for option in keep)
            + replayed * sum(option.seconds for option in replay)
            + sum(option.seconds for option in decode),
            phases=phases,
        )


def solve(table: CostTable, num_steps: int, grad_steps: Sequence[int], budget_bytes: int) -> Plan:
    """The fastest plan whose predicted peak stays within the budget; of equally fast ones the leanest.

    Args:
        table: costs at this batch size, resolution and dtype.
        num_steps: length of the chain.
        grad_steps: indices of the gradient steps, ascending.
        budget_bytes: all that may be alive at any moment, weights included.

    Raises:
        BudgetInfeasible: every plan needs more; names the least budget that would do.
    """
    plans = list(_candidates(table, num_steps, grad_steps))
    fitting = [plan for plan in plans if plan.peak_bytes <= budget_bytes]
    if not fitting:
        raise BudgetInfeasible(budget_bytes, min(plan.peak_bytes for plan in plans))
    best = min(fitting, key=lambda plan: (plan.seconds, plan.peak_bytes))
    return replace(best, budget_bytes=budget_bytes)
