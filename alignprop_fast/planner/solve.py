"""Finds the fastest plan within a memory budget, and the least budget that has a plan."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from alignprop_fast.planner.budget import BudgetInfeasible
from alignprop_fast.planner.cuda_graphs import GraphUse
from alignprop_fast.planner.curves import Candidate, Curves
from alignprop_fast.planner.plan import Plan
from alignprop_fast.planner.remedies import remedies
from alignprop_fast.planner.simulate import price
from alignprop_fast.planner.table import CostTable, Segment, Stage

HOST_PRICES = 4
_NONE = (np.inf, 0, 0, 0, 0)


def solve(table: CostTable, num_steps: int, grad_steps: Sequence[int], budget_bytes: int) -> Plan:
    """The fastest plan whose predicted peak stays within the budget; among equally fast ones the leanest.

    Each training step draws its gates again, so the plan holds for all gates with as many gradient steps: it leaves
    room for a step without graph after all resident ones, even if these gates have none there. (`peak_bytes` is the
    peak of these gates.) A larger budget never gives a slower plan. If the table limits host memory, plans that offload
    more are excluded, and a few prices of host memory lead to plans that offload less. To solve for many budgets or
    gates, keep a `Solver`.

    Args:
        table: costs at this batch size, resolution and dtype.
        num_steps: length of the chain.
        grad_steps: indices of the gradient steps, ascending.
        budget_bytes: the most bytes alive at any moment, weights included.

    Raises:
        BudgetInfeasible: every plan needs more; the message names the least budget and what would lower it.
        ValueError: grad_steps are not ascending indices of steps.
    """
    return Solver(table, num_steps, len(grad_steps)).plan(grad_steps, budget_bytes)


class Solver:
    """Solves one table for any budget and any gates; the slow part runs once.

    Args:
        table: costs at this batch size, resolution and dtype.
        num_steps: length of the chain.
        most_grad_steps: the largest number of gradient steps that `solve` will get.
    """

    def __init__(self, table: CostTable, num_steps: int, most_grad_steps: int):
        if not 0 <= most_grad_steps <= num_steps:
            raise ValueError(f"{most_grad_steps} gradient steps of {num_steps}: use at most as many as there are steps")
        self.table, self.num_steps = table, num_steps
        self.most_grad_steps = most_grad_steps
        self._curves: dict[int, list[Curves]] = {}

    def plan(self, grad_steps: Sequence[int], budget_bytes: int) -> Plan:
        """As `solve`."""
        steps = tuple(grad_steps)
        if list(steps) != sorted(set(steps)) or (steps and not 0 <= steps[0] <= steps[-1] < self.num_steps):
            raise ValueError(f"gradient steps must be ascending indices below {self.num_steps}, not {steps}")
        if len(steps) > self.most_grad_steps:
            raise ValueError(f"{len(steps)} gradient steps: this solver takes at most {self.most_grad_steps}")
        plan = self._fastest(steps, budget_bytes)
        if plan is None:
            smallest = self._smallest(steps)
            raise BudgetInfeasible(budget_bytes, smallest.peak_bytes, remedies(smallest))
        return replace(plan, budget_bytes=budget_bytes)

    def fits(self, grad_steps: int, budget_bytes: int) -> bool:
        """Whether any plan for this number of gradient steps keeps the budget. Faster than `plan`."""
        room = budget_bytes - self.table.base_bytes(grad_steps)
        made = self._made(self._most(grad_steps))
        free = next(made)
        if free.fits(grad_steps, room):
            return True
        # Those with a price have its leanest options.
        others = made if free.leanest_bytes(grad_steps) <= room else islice(made, 1)
        return any(curves.fits(grad_steps, room) for curves in others)

    def may_fit(self, grad_steps: int, budget_bytes: int) -> bool:
        """Whether the leanest options keep the budget, whatever host memory they take. If not, no plan does."""
        room, most = budget_bytes - self.table.base_bytes(grad_steps), self._most(grad_steps)
        tables = (self.table, _without_offload(self.table))
        return any(
            table is not None and Curves(table, self.num_steps, most).leanest_bytes(grad_steps) <= room
            for table in tables
        )

    def curves(self, grad_steps: int) -> list[Curves]:
        """Frontiers for this number of gradient steps: with offloading and, if the host limit may exclude it, without
        and with less of it."""
        most = self._most(grad_steps)
        if most not in self._curves:
            self._curves[most] = list(self._made(most))
        return self._curves[most]

    def _most(self, grad_steps: int) -> int:
        """A single gradient step has its own frontiers, because it has no sums of gradients beside it."""
        return self.most_grad_steps if grad_steps > 1 else min(self.most_grad_steps, 1)

    def _made(self, most: int) -> Iterator[Curves]:
        free = Curves(self.table, self.num_steps, most)
        yield free
        plain = _without_offload(self.table)
        if plain is not None and (self.table.transfer_bytes or free.exceed_host_limit()):
            free.recorded = Curves(plain, self.num_steps, most)
            yield free.recorded
        if free.exceed_host_limit():
            prices = _host_prices(self.table)
            free.prices = [0.0, *prices]
            for byte_seconds in prices:
                priced = Curves(self.table, self.num_steps, most, byte_seconds)
                priced.recorded, priced.prices = free.recorded, free.prices
                yield priced

    def _fastest(self, steps: tuple[int, ...], budget_bytes: int) -> Plan | None:
        room = budget_bytes - self.table.base_bytes(len(steps))
        all_curves = self.curves(len(steps))
        uses = [GraphUse.NONE] if self.table.graphs is None else list(GraphUse)
        found: dict[tuple[float, int, int, int, int], Candidate] = {}
        for order, use in enumerate(uses):
            for which, curves in enumerate(all_curves):
                for candidate in curves.candidates(len(steps), room, use, lambda: min(found, default=_NONE)[0]):
                    found[candidate.seconds, candidate.need, which, order, candidate.resident] = candidate
        if not found:
            return None
        best = min(found)
        return price(self.table, all_curves[best[2]].plan(steps, found[best]))

    def _smallest(self, steps: tuple[int, ...]) -> Plan:
        """The leanest plan."""
        needs = [need for curves in self.curves(len(steps)) for need in curves.least_needs(len(steps))]
        if not needs:
            raise ValueError("the cost table's host limit leaves no plan: raise it, or add options without offload")
        plan = self._fastest(steps, self.table.base_bytes(len(steps)) + min(needs))
        assert plan is not None
        return plan


def _host_prices(table: CostTable) -> list[float]:
    """Prices of a byte in host memory, in seconds: from the least that an option saves by one to the most."""
    saved = [
        (plain.seconds - option.seconds) / option.host_bytes
        for segment in table.step
        for option in segment.options
        for plain in segment.options
        if option.host_bytes and not plain.host_bytes and plain.seconds > option.seconds
    ]
    return list(np.geomspace(min(saved), max(saved), HOST_PRICES)) if saved else []


def _without_offload(table: CostTable) -> CostTable | None:
    """The table without options that keep bytes in host memory; None if a segment or a part has no other option."""

    def plain(segments: Sequence[Segment]) -> tuple[Segment, ...] | None:
        options = [tuple(option for option in segment.options if not option.host_bytes) for segment in segments]
        if not all(options):
            return None
        return tuple(replace(segment, options=kept) for segment, kept in zip(segments, options, strict=True))

    def stages(alternatives: Sequence[Stage]) -> tuple[Stage, ...]:
        parts = [(stage, plain(stage.segments)) for stage in alternatives]
        return tuple(replace(stage, segments=segments) for stage, segments in parts if segments is not None)

    step, decoders, rewards = plain(table.step), stages(table.decoders), stages(table.rewards)
    if step is None or not decoders or (table.rewards and not rewards):
        return None
    return replace(table, step=step, decoders=decoders, rewards=rewards, transfer_bytes=0)
