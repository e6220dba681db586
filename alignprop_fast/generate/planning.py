"""Plans of a sampler's calls. Costs are measured once for each shape of a training step, and solvers are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from alignprop_fast.generate.cost_table import Decoders, TrainingStep, counted_table, measured_table
from alignprop_fast.generate.graph_costs import counted_graphs, graph_costs
from alignprop_fast.generate.memory_budget import MemoryBudget
from alignprop_fast.generate.render import Renderer
from alignprop_fast.planner import BudgetInfeasible, CostTable, CountedTable, Gpu, GraphCosts, Plan, Solver, leanest
from alignprop_fast.runtime import Chain, Told, autocast_dtype, nobody


def gradient_steps(chain: Chain, wanted: Iterable[int], wants_gradient: bool = False) -> list[int]:
    """The wanted steps; none if nothing could receive a gradient. wants_gradient: the initial latents do."""
    return list(wanted) if torch.is_grad_enabled() and (chain.receivers or wants_gradient) else []


class StepPlanner:
    """Makes the plan of a training step within a memory budget.

    Args:
        model: an adapter of `models`.
        budget: the memory budget.
        renderer: runs the chains, and knows how much host memory there is.
        num_steps: of a whole chain.
    """

    def __init__(self, model: Any, budget: MemoryBudget, renderer: Renderer, num_steps: int):
        self.model, self.budget, self.renderer, self.num_steps = model, budget, renderer, num_steps
        self.solvers: dict[tuple, Solver] = {}
        self.decoders: Decoders = {}
        self.graphs: dict[tuple, GraphCosts | None] = {}

    @property
    def has_budget(self) -> bool:
        return self.budget.exists(self.model.device)

    def plan(self, step: TrainingStep, grad_steps: Sequence[int], wants_gradient: bool = False) -> Plan:
        """The fastest plan that keeps the budget; the leanest if there is no budget or no gradient.

        wants_gradient: the initial latents do.

        Raises:
            BudgetInfeasible: no plan keeps the budget.
        """
        # A chain that ends early is planned as a whole one, so one solver serves all lengths except a single step.
        num_steps = 1 if step.chain.num_steps == 1 else self.num_steps
        if not (self.has_budget and torch.is_grad_enabled() and (grad_steps or wants_gradient)):
            # Without a backward pass nothing was planned, so graphs would take memory that is not there.
            return leanest(num_steps, grad_steps, self._graphs(step) if grad_steps else None)
        solver = self.solver(step, num_steps)
        return solver.plan(grad_steps, self.settled_bytes(step))

    def solver(self, step: TrainingStep, num_steps: int) -> Solver:
        """The solver for steps of this shape, under the autocast state at the time of the call."""
        key = (num_steps, *self._shape(step))
        if key not in self.solvers:
            self.solvers[key] = Solver(self._measured(step), num_steps, num_steps)
        table, limit_bytes = self.solvers[key].table, self.renderer.host_pool.limit_bytes
        if limit_bytes is not None and limit_bytes < (table.host_limit_bytes or 0):  # the driver refused more
            self.solvers[key] = Solver(replace(table, host_limit_bytes=limit_bytes), num_steps, num_steps)
        return self.solvers[key]

    def _shape(self, step: TrainingStep) -> tuple:
        """What the costs of a step depend on, in one sampler."""
        embeds = step.cond.embeds
        cast = autocast_dtype(self.model.device)
        return step.batch, embeds.shape, embeds.dtype, len(step.chain.receivers), cast

    def _measured(self, step: TrainingStep, told: Told = nobody) -> CostTable:
        return replace(measured_table(step, self.decoders, told), graphs=self._graphs(step))

    def _graphs(self, step: TrainingStep) -> GraphCosts | None:
        key = self._shape(step)
        if key not in self.graphs:
            self.graphs[key] = graph_costs(step)
        return self.graphs[key]

    def measured(self, step: TrainingStep, told: Told = nobody) -> CostTable:
        """Costs of such a step on the device."""
        with torch.enable_grad():
            return self._measured(step, told)

    def counted(self, step: TrainingStep, gpu: Gpu, told: Told = nobody) -> CountedTable:
        """Costs of such a step for any GPU. gpu: decides which products are rounded, if any are."""
        with torch.enable_grad():
            return replace(counted_table(step, gpu, self.decoders, told), graphs=counted_graphs(step))

    def settled_bytes(self, step: TrainingStep) -> int:
        """The budget in bytes; on a GPU reduced to its free memory after such a step has run once."""
        return self.budget.settle(self.model.device, partial(self._warm_up, step))

    def _warm_up(self, step: TrainingStep) -> None:
        """Run one gradient step and its pictures, forward and backward, by the leanest plan; draws no random number."""
        chain = step.chain.last_alone()
        with torch.random.fork_rng(devices=[self.model.device]), torch.enable_grad():
            x = self.model.initial_latents(step.batch, step.size, None, None).requires_grad_()
            images = self.renderer.render(chain, leanest(1, (0,)), x).images
            torch.autograd.grad(images.sum(), [x, *chain.parameters], allow_unused=True)

    def tighten(self, factor: float, last: Plan | None) -> int:
        """From now on plan with less memory than the last plan took; returns the new budget in bytes.

        Raises:
            BudgetInfeasible: there is no leaner plan.
        """
        size_bytes = self.budget.size_bytes
        if self.model.device.type != "cuda" and not self.has_budget:
            raise BudgetInfeasible(0, 0)
        if not self.has_budget:
            taken_bytes = torch.cuda.get_device_properties(self.model.device).total_memory
        elif size_bytes is None or not self.solvers:  # it ran out while costs were measured
            raise BudgetInfeasible(size_bytes or 0, size_bytes or 0)
        else:
            peak_bytes = last.peak_bytes if last else 0
            taken_bytes = min(size_bytes, peak_bytes or size_bytes)
        budget_bytes = int(factor * taken_bytes)
        for solver in self.solvers.values():
            solver.plan(range(solver.num_steps), budget_bytes)
        self.budget.size_bytes = budget_bytes
        return budget_bytes
