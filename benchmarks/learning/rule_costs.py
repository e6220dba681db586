"""What a training step costs under each truncation rule, planned for a GPU that need not be here.

    python -m benchmarks.learning.rule_costs

SDXL and FLUX.1 at 1024 x 1024, batch 1, reward hpsv2, in bf16; where FLUX.1 does not fit, its base is in fp8. Seconds
are a roofline by the data sheet, not measured. Both tables of costs are counted once, in a minute or two, and kept as
those of `alignprop-fast plan` are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from alignprop_fast.cli.plan_options import PlanOptions
from alignprop_fast.cli.plan_question import Question, from_model
from alignprop_fast.cli.plan_summary import predict
from alignprop_fast.planner import BudgetInfeasible
from benchmarks import RESULTS
from benchmarks.learning.chains import RULES
from benchmarks.rows import write_rows

MODELS: dict[str, dict[str, Any]] = {
    "sdxl": {"num_inference_steps": 50, "guidance_scale": 5.0},
    "flux-dev": {"num_inference_steps": 28, "guidance_scale": 3.5, "base_dtype": "fp8"},
}


def rows_of(question: Question) -> Iterator[dict[str, Any]]:
    """One row for each rule: the most memory, and seconds in the mean."""
    facts = {name: question.facts[name] for name in ("model", "gpu", "reward")}
    for rule in RULES:
        row = {**facts, "steps": question.num_steps, "batch": question.batch, "rule": rule}
        table = question.tables[question.batch]
        try:
            found = predict(table, question.num_steps, rule, question.batch, question.budget_bytes)
        except BudgetInfeasible as error:
            yield row | {"peak_bytes": error.smallest_bytes, "status": "does not fit"}
            continue
        plan = found.expected
        row |= {"resident": len(plan.resident_steps), "replayed": len(plan.replayed_steps)}
        row |= {"peak_bytes": found.worst.peak_bytes, "host_bytes": found.worst.host_bytes}
        yield row | {"seconds": round(plan.seconds, 3), "most_seconds": round(found.worst.seconds, 3), "status": "ok"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS))
    parser.add_argument("--gpu", default="RTX 4090")
    parser.add_argument("--memory-budget", default="24GiB")
    parser.add_argument("--csv", type=Path, default=RESULTS / "estimated" / "rule_costs.csv")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in args.models:
        asked = {"gpu": args.gpu, "memory_budget": args.memory_budget, "host_memory": "32GiB", "reward": "hpsv2"}
        options = PlanOptions(output_dir="", model=model, batch_size=1, **asked, **MODELS[model])
        for row in rows_of(from_model(Console(), options)):
            rows.append(row)
            print(row, flush=True)
    columns = max((list(row) for row in rows), key=len)
    write_rows(args.csv, rows, columns)


if __name__ == "__main__":
    main()
