"""The plan of each row of the table of training steps, for a GPU that only its data sheet describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from alignprop_fast.planner import BudgetInfeasible, Gpu, Solver, budget_on, find_gpu, scaled
from alignprop_fast.planner.gpus import MATMUL_FRACTION
from benchmarks.step.chain import provenance
from benchmarks.step.train_step_rows import BUDGETS_GIB, Table, prediction, settings
from benchmarks.step.train_step_variants import Bench, step_flop

GIB = 2**30
HOST_LIMIT_BYTES = 32 * GIB


def estimate(
    name: str, models: Sequence[str], steps: int | None, reward: str, versions: dict[str, str], table: Table
) -> None:
    """Rows for all batch sizes, gradient steps and budgets.

    Two cost tables per model are counted; the others are interpolated. A budget beyond the GPU's memory gets a plan
    too, and its status says so. Offloading may take half of the computer's memory, which is assumed to be 64 GiB.
    """
    gpu = find_gpu(name)
    for model in models:
        chosen = settings([model])
        num_steps = steps or chosen[0].steps
        device = torch.device("cpu" if model == "small" else "meta")
        bench = Bench(model, device, num_steps, reward)
        flop = bench.flop()
        one, two = (bench.sampler.cost_table(batch, gpu) for batch in (1, 2))
        common = {**provenance(device), **versions, "device": f"{gpu.name}, estimated", "model": model}
        common |= {"dtype": str(bench.dtype)[6:], "reward": reward, "steps": str(num_steps)}
        for batch in sorted({setting.batch for setting in chosen}):
            costs = replace(scaled(one, two, 1, 2, batch), host_limit_bytes=HOST_LIMIT_BYTES)
            solver = Solver(costs, num_steps, num_steps)
            for grad_steps in sorted({min(setting.grad_steps, num_steps) for setting in chosen}):
                for budget in BUDGETS_GIB:
                    row = {**common, "batch": batch, "grad_steps": grad_steps, "variant": "ours", "budget_gib": budget}
                    row["status"], budget_bytes = _held(gpu, budget * GIB)
                    try:
                        plan = solver.plan(range(num_steps - grad_steps, num_steps), budget_bytes)
                    except BudgetInfeasible as error:
                        row |= {"status": "does not fit", "least_bytes": error.smallest_bytes}
                    else:
                        rate = step_flop(flop, batch, num_steps, grad_steps) / plan.seconds
                        row |= prediction(plan) | {"samples_per_second": round(batch / plan.seconds, 4)}
                        row["gemm_share"] = round(rate / (MATMUL_FRACTION * gpu.bf16_flops), 4)
                    table.write(row)


def _held(gpu: Gpu, budget_bytes: int) -> tuple[str, int]:
    """Status and budget; a budget with the size on the box is reduced to the GPU's real memory."""
    try:
        return "ok", budget_on(gpu.name, gpu.memory_bytes, budget_bytes)[0]
    except ValueError:
        return "more than the GPU has", budget_bytes
