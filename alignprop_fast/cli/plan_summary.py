"""A plan on the screen and as JSON: whether it fits, where the memory goes, how long a step takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from alignprop_fast.planner import (
    MOST_BATCH,
    CostTable,
    Moment,
    Plan,
    by_group,
    format_bytes,
    ranges,
    scoring_seconds,
    simulate,
)


@dataclass(frozen=True)
class Prediction:
    """A table's predictions for a training step.

    worst: the plan with the most gradient steps that the truncation rule may open. expected: the plan with their mean
        number, rounded; the same plan if the costs are fixed. Their seconds include what the rule does beside a whole
        chain (`Rule.beside`).
    largest: the largest batch size whose worst case keeps the budget; None if unknown.
    """

    table: CostTable
    worst: Plan
    expected: Plan
    batch: int
    largest: int | None = None


def predict(table: CostTable, num_steps: int, truncation: str, batch: int, budget_bytes: int) -> Prediction:
    """The plans of a table under a truncation rule.

    Raises:
        BudgetInfeasible: the worst case has no plan within the budget.
        ValueError: an unknown rule.
    """
    from alignprop_fast.planner import Solver
    from alignprop_fast.sampling.draw import parse_rule

    rule = parse_rule(truncation, num_steps)
    (most, mean), beside = rule.count(num_steps), rule.beside(num_steps)
    solver, count = Solver(table, num_steps, most), round(mean)
    worst = expected = solver.plan(range(num_steps - most, num_steps), budget_bytes)
    if count < most:
        expected = solver.plan(range(num_steps - count, num_steps), budget_bytes)
    if any(beside):
        alone = Solver(table, 1, 1).plan((0,), budget_bytes)
        chain_seconds = beside.chains * (alone.seconds - table.optimizer_seconds)
        more_seconds = chain_seconds + beside.pictures * scoring_seconds(table, worst)
        worst = _with_more(table, worst, max(beside.evaluations, 0.0), more_seconds)
        expected = _with_more(table, expected, beside.evaluations, more_seconds)
    return Prediction(table, worst, expected, batch)


def _with_more(table: CostTable, plan: Plan, evaluations: float, seconds: float) -> Plan:
    """The plan of a training step with more evaluations without gradient (or fewer) and more seconds."""
    return replace(plan, seconds=plan.seconds + evaluations * table.closed_seconds_of(plan.graphs) + seconds)


def print_prediction(console: Console, prediction: Prediction) -> None:
    """Print tables: both plans, the peak by phase and by kind of memory, the options in words."""
    worst, budget = prediction.worst, prediction.worst.budget_bytes
    phase = max(worst.phases, key=lambda name: worst.phases[name])
    of_budget = "" if budget is None else f" of {format_bytes(budget)}"
    console.print(f"fits: predicted peak {format_bytes(worst.peak_bytes)}{of_budget}, in the phase '{phase}'")
    if prediction.largest is not None:
        more = " or more" if prediction.largest >= MOST_BATCH else ""
        console.print(f"largest batch that fits: {prediction.largest}{more}")
    console.print(_plans(prediction))
    console.print(_peaks(prediction))
    console.print(_options(worst))


def write_json(path: Path, prediction: Prediction, facts: Mapping[str, Any]) -> None:
    """The given facts, then the worst case's plan and the numbers of the expected one."""
    from alignprop_fast.files import write_whole

    worst, expected = prediction.worst, prediction.expected
    content = {
        **facts,
        "fits": True,
        "batch_size": prediction.batch,
        "largest_batch_size": prediction.largest,
        "budget_bytes": worst.budget_bytes,
        "num_inference_steps": worst.num_steps,
        **_numbers(worst, prediction.batch),
        "expected": _numbers(expected, prediction.batch),
        "phases": dict(worst.phases),
        "kinds": dict(worst.kinds),
        "cuda_graphs": worst.graphs,
        "options": {
            "resident": [dict(options) for options in worst.resident_options],
            "replayed": dict(worst.replay_options),
            "decoder": asdict(worst.decoder),
            "reward": None if worst.reward is None else asdict(worst.reward),
        },
        "origin": dict(prediction.table.origin),
    }
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def _numbers(plan: Plan, batch: int) -> dict[str, Any]:
    return {
        "gradient_steps": len(plan.resident_steps) + len(plan.replayed_steps),
        "peak_bytes": plan.peak_bytes,
        "host_bytes": plan.host_bytes,
        "seconds_per_step": plan.seconds,
        "images_per_hour": _images_per_hour(plan, batch),
        "resident_steps": list(plan.resident_steps),
        "replayed_steps": list(plan.replayed_steps),
    }


def _images_per_hour(plan: Plan, batch: int) -> float | None:
    return 3600 * batch / plan.seconds if plan.seconds else None


def _plans(prediction: Prediction) -> Table:
    columns = {"worst case": prediction.worst}
    if prediction.expected != prediction.worst:
        columns["on average"] = prediction.expected
    table = Table("", *columns, box=SIMPLE_HEAD)
    rows = {
        "steps with gradient": lambda plan: (
            f"{len(plan.resident_steps) + len(plan.replayed_steps)} of {plan.num_steps}"
        ),
        "  resident": lambda plan: _counted(plan.resident_steps),
        "  replayed": lambda plan: _counted(plan.replayed_steps),
        "seconds per training step": lambda plan: f"{plan.seconds:.3g}",
        "images per hour": lambda plan: f"{_images_per_hour(plan, prediction.batch) or 0:.0f}",
        "peak": lambda plan: format_bytes(plan.peak_bytes),
        "in host memory": lambda plan: _in_host_memory(plan, prediction.table),
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(plan) for plan in columns.values()))
    return table


def _in_host_memory(plan: Plan, table: CostTable) -> str:
    limit = "" if table.host_limit_bytes is None else f" of {format_bytes(table.host_limit_bytes)}"
    return f"{format_bytes(plan.host_bytes) if plan.host_bytes else 'nothing'}{limit}"


def _counted(steps: tuple[int, ...]) -> str:
    return f"{len(steps)} ({ranges(steps)})" if steps else "none"


def _peaks(prediction: Prediction) -> Table:
    """A table of the worst moment of each phase, by kind of memory."""
    moments: dict[str, Moment] = {}
    for moment in simulate(prediction.table, prediction.worst):
        if moment.phase not in moments or moment.bytes > moments[moment.phase].bytes:
            moments[moment.phase] = moment
    groups = {phase: by_group(moment.kinds) for phase, moment in moments.items()}
    names = list(dict.fromkeys(name for sizes in groups.values() for name in sizes))
    unit = 2**30 if prediction.worst.peak_bytes >= 2**30 else 2**20
    table = Table(f"worst moment, {'GiB' if unit == 2**30 else 'MiB'}", box=SIMPLE_HEAD)
    for name in (*names, "in all"):
        table.add_column(name, justify="right")
    for phase, sizes in groups.items():
        bold = "bold" if moments[phase].bytes == prediction.worst.peak_bytes else None
        cells = [f"{size / unit:.2f}" for size in (*sizes.values(), moments[phase].bytes)]
        table.add_row(phase, *cells, style=bold)
    return table


def _options(plan: Plan) -> Table:
    table = Table("how", "option x blocks that take it", box=SIMPLE_HEAD)
    for what, how in plan.option_lines():
        table.add_row(what, how)
    return table
