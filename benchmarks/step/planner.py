"""Peak and seconds of the plan for each budget, beside the all-or-nothing switches of other trainers.

    python -m benchmarks.step.planner --model demo                   # measured here, every plan run: about 5 minutes
    python -m benchmarks.step.planner --model sdxl --gpu "RTX 4090"  # estimated for a GPU that need not be here
    python -m benchmarks.step.planner --model sdxl                   # on a GPU: random weights, every plan run
    python -m benchmarks.step.planner --plot-only                    # the pictures again, from the CSV

The reward is the mean of the image, which costs nothing. Switches are plans made by hand for the same batch size:
"keep all" keeps every gradient step whole; "checkpoint blocks" keeps every step and runs every block again; "replay
steps" runs every gradient step again, as trl's trainer does; "replay + checkpoint" does both.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from alignprop_fast import DifferentiableSampler
from alignprop_fast.planner import BlockOption, BudgetInfeasible, CostTable, Plan, Solver, StageChoice, find_gpu, price
from alignprop_fast.runtime import LiveBytes, PeakMeter
from benchmarks import RESULTS
from benchmarks.rows import write_rows
from benchmarks.step.chain import PROMPTS, provenance

SWITCHES = {
    "keep all": (True, BlockOption.KEEP),
    "checkpoint blocks": (True, BlockOption.RECOMPUTE),
    "replay steps": (False, BlockOption.KEEP),
    "replay + checkpoint": (False, BlockOption.RECOMPUTE),
}


def make_sampler(args: argparse.Namespace, device: torch.device) -> DifferentiableSampler:
    """The bundled model, or a published architecture: on meta tensors for a named GPU, else with random weights."""
    from alignprop_fast.models.architectures import architecture
    from alignprop_fast.models.load.pipeline import load_pipeline
    from alignprop_fast.models.lora.adapters import add_lora

    if args.model == "demo":
        pipe = load_pipeline("demo", device=device)
        add_lora(pipe, 4, 4)
    else:
        pipe = architecture(args.model, device=device).pipe
    return DifferentiableSampler(pipe, args.steps, memory_budget=2**50)


def switch(name: str, table: CostTable, num_steps: int, grad_steps: range) -> Plan:
    """The plan of an all-or-nothing switch, with the table's predictions."""
    resident, option = SWITCHES[name]
    step = {s.name: option if option in [o.name for o in s.options] else s.options[-1].name for s in table.step}
    decoder = next(stage for stage in table.decoders if stage.name == "batch")
    kept = {s.name: option if option in [o.name for o in s.options] else BlockOption.KEEP for s in decoder.segments}
    reward = StageChoice("batch", {"*": BlockOption.KEEP}) if table.rewards else None
    steps = tuple(grad_steps)
    plan = Plan(
        num_steps,
        resident_steps=steps if resident else (),
        replayed_steps=() if resident else steps,
        resident_options=(step,) * len(steps) if resident else (),
        replay_options={} if resident else step,
        decoder=StageChoice("batch", kept),
        reward=reward,
    )
    return price(table, plan)


def run(sampler: DifferentiableSampler, plan: Plan, batch: int, there_bytes: int, repeats: int) -> dict[str, Any]:
    """Run the plan; returns its peak bytes and median seconds."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    device = sampler.model.device

    def step() -> None:
        sampler(prompts, plan=plan).mean().backward()
        sampler.model.denoiser.zero_grad()

    if device.type == "cuda":
        with PeakMeter(device) as meter:
            step()
        peak_bytes = meter.peak_bytes
    else:
        with LiveBytes() as live:
            step()
        peak_bytes = live.peak_bytes
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"measured_bytes": there_bytes + peak_bytes, "measured_seconds": round(statistics.median(seconds), 4)}


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    gpu = find_gpu(args.gpu) if args.gpu else None
    device = torch.device("meta" if gpu else "cuda" if torch.cuda.is_available() else "cpu")
    sampler = make_sampler(args, device)
    table = sampler.cost_table(args.batch_size, gpu)
    grad_steps = range(args.steps - args.grad_steps, args.steps)
    solver = Solver(table, args.steps, args.grad_steps)
    switches = {name: switch(name, table, args.steps, grad_steps) for name in SWITCHES}
    try:
        solver.plan(grad_steps, 1)
    except BudgetInfeasible as error:
        least = error.smallest_bytes
    most = solver.plan(grad_steps, 2**50).peak_bytes
    budgets = [int(least * (most / least) ** (k / (args.points - 1))) + 1 for k in range(args.points)]
    plans: list[tuple[str, Any, Plan]] = [("planner", budget, solver.plan(grad_steps, budget)) for budget in budgets]
    plans += [(name, "", plan) for name, plan in switches.items()]
    # No optimizer runs here, so there is no optimizer state.
    absent = table.fixed["optimizer"]
    there_bytes = table.fixed["weights"] + table.fixed["adapters"]
    limit = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**50
    rows = []
    for method, budget, plan in plans:
        row = {
            **provenance(device),
            "gpu": gpu.name if gpu else "",
            "model": args.model,
            "batch": args.batch_size,
            "steps": args.steps,
            "grad_steps": args.grad_steps,
            "method": method,
            "budget_bytes": budget,
            "predicted_bytes": plan.peak_bytes,
            "predicted_seconds": round(plan.seconds, 4),
            "resident": len(plan.resident_steps),
            "replayed": len(plan.replayed_steps),
            "decoder": plan.decoder.name,
            "host_bytes": plan.host_bytes,
            "measured_bytes": "",
            "measured_seconds": "",
        }
        if gpu is None and plan.peak_bytes < limit:
            row |= run(sampler, plan, args.batch_size, there_bytes + absent, args.repeats)
            assert row["measured_bytes"] <= plan.peak_bytes, f"the plan took more than it said: {row}"
        rows.append(row)
        print({key: row[key] for key in list(row)[8:]})
    return rows


def plot(file: Path) -> None:
    """Plot peak and seconds per step over the budget, from the CSV, with switches as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(file, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    planned = [row for row in rows if row["method"] == "planner"]
    gib = 2**30

    def peak(row: dict[str, str]) -> float:
        return float(row["measured_bytes"] or row["predicted_bytes"]) / gib

    def seconds(row: dict[str, str]) -> float:
        return float(row["measured_seconds"] or row["predicted_seconds"])

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    budgets = [float(row["budget_bytes"]) / gib for row in planned]
    left.plot(budgets, budgets, color="0.6", linestyle="--", label="budget")
    left.plot(budgets, [peak(row) for row in planned], "o-", color="#0072B2", markersize=3, label="peak")
    left.set(xlabel="memory budget, GiB", ylabel="peak, GiB", title="The budget is kept")
    left.legend(frameon=False)
    right.plot([peak(row) for row in planned], [seconds(row) for row in planned], "o-", color="#0072B2", markersize=3)
    right.annotate("planner", (peak(planned[0]), seconds(planned[0])), (6, 6), textcoords="offset points")
    for row, mark in zip([row for row in rows if row["method"] != "planner"], "sD^v", strict=True):
        right.plot([peak(row)], [seconds(row)], mark, color="#D55E00", label=row["method"])
    right.set(xscale="log", xlabel="peak, GiB", ylabel="seconds a training step", title="Time for memory")
    right.legend(frameon=False)
    first = rows[0]
    how = f"estimated for {first['gpu']}" if first["gpu"] else f"measured on {first['device']}"
    figure.suptitle(
        f"{first['model']}, batch {first['batch']}, {first['steps']} steps, {first['grad_steps']} with gradient, {how}"
    )
    figure.savefig(file.with_suffix(".png"), dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a name of models.architectures")
    parser.add_argument("--gpu", help="estimate for this GPU instead of measuring here")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--grad-steps", type=int, default=25, help="number of last steps that carry gradient")
    parser.add_argument("--points", type=int, default=12, help="budgets, from the least feasible to the largest useful")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="CSV to write; the picture goes beside it")
    parser.add_argument("--plot-only", action="store_true", help="only draw the pictures of existing CSV files")
    args = parser.parse_args()
    if args.plot_only:
        for file in [args.output] if args.output else sorted(RESULTS.glob("*/planner_*.csv")):
            plot(file)
        return
    rows = sweep(args)
    where = "estimated" if args.gpu else "cpu" if not torch.cuda.is_available() else "gpu"
    file = args.output or RESULTS / where / f"planner_{args.model}.csv"
    write_rows(file, rows)
    plot(file)


if __name__ == "__main__":
    main()
