"""The rows of the table of training steps, the most important first, so that a run that is cut off has those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from alignprop_fast.planner import Plan
from benchmarks.rows import write_rows

GRAD_STEPS = (1, 5, 25, 50)
BUDGETS_GIB = (12, 16, 24, 48, 80)
COLUMNS = (
    *("device", "torch", "triton", "commit", "dtype", "reward", "model", "batch", "steps", "grad_steps"),
    *("variant", "budget_gib", "status", "seconds", "spread_seconds", "repeats", "samples_per_second"),
    *("peak_bytes", "predicted_peak_bytes", "predicted_seconds", "host_bytes", "least_bytes"),
    *("gemm_tflops", "gemm_share", "plan"),
)


@dataclass(frozen=True)
class Setting:
    """A model, a batch size and a number of gradient steps, with budgets and rivals to measure."""

    model: str
    batch: int
    grad_steps: int
    budgets_gib: tuple[float, ...]
    rivals: tuple[str, ...] = ("eager", "compiled")
    trl: bool = False
    steps: int = 50


# What the package promises: SDXL on 24 GB, SD1.5 beside trl. Then the rest of both.
_FIRST = (
    Setting("sdxl", 1, 25, (24, 80)),
    Setting("sdxl", 4, 25, (24, 80), ("eager",)),
    Setting("sd15", 4, 25, (24, 80), trl=True),
    Setting("sd15", 1, 25, (12, 24), trl=True),
)


def settings(models: Sequence[str]) -> list[Setting]:
    """The settings of these models, the most important first."""
    if "small" in models:
        # One budget that keeps everything, and one that is too small for any plan.
        return [Setting("small", 2, 2, (1, 0.001), trl=True, steps=3)]
    first = [setting for setting in _FIRST if setting.model in models]
    done = {(s.model, s.batch, s.grad_steps) for s in first}
    rest = []
    for model in [name for name in ("sdxl", "sd15") if name in models]:
        for grad_steps, batch in product((25, 1, 50, 5), (1, 4, 2, 8)):
            new = (model, batch, grad_steps) not in done
            same = [s for s in first if (s.model, s.batch, s.grad_steps) == (model, batch, grad_steps)]
            known = {size for setting in same for size in setting.budgets_gib}
            budgets = tuple(size for size in (24, 12, 48, 16, 80) if size not in known)
            rivals = ("eager", "compiled") if new else ()
            rest.append(Setting(model, batch, grad_steps, budgets, rivals, trl=new and model == "sd15"))
    return first + rest


class Table:
    """The rows so far, in a CSV that is rewritten whenever one changes."""

    def __init__(self, file: Path):
        self.file, self.rows = file, list[dict[str, Any]]()
        file.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: dict[str, Any]) -> None:
        """Add or update the row."""
        if not any(row is known for known in self.rows):
            self.rows.append(row)
        self.save()

    def save(self) -> None:
        write_rows(self.file, self.rows, COLUMNS)


def prediction(plan: Plan) -> dict[str, Any]:
    """The plan's prediction for its row."""
    resident, replayed = len(plan.resident_steps), len(plan.replayed_steps)
    return {
        "predicted_peak_bytes": plan.peak_bytes,
        "predicted_seconds": round(plan.seconds, 4),
        "host_bytes": plan.host_bytes,
        "plan": f"{resident} resident, {replayed} replayed; "
        + "; ".join(f"{what}: {how}" for what, how in plan.option_lines()),
    }
