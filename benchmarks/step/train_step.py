"""One training step of SD1.5 at 512 and SDXL at 1024: samples per second and peak bytes, beside the alternatives.

    python -m benchmarks.step.train_step --seconds 500               # on a GPU: both models, most telling rows first
    python -m benchmarks.step.train_step --model small --device cpu  # dry run
    python -m benchmarks.step.train_step --estimate "RTX 4090"       # the plan of each row; needs no GPU
    python -m benchmarks.step.train_step --table train_step.csv      # table and picture again, from the CSV

A step has 50 denoising steps with guidance, of which the last K carry gradient, the decoder, a reward as large as HPS
v2 (ViT-H), the backward pass, and AdamW on adapters of rank 16. Weights are random and in bf16.

ours: under each budget. The allocator enforces the whole budget; the plan leaves `--headroom` of it for fragmentation.
eager: diffusers, PEFT, SDPA and gradient checkpointing of blocks; if memory runs out, also of each UNet call.
compiled: like eager, with torch.compile of the transformer blocks (or of the whole UNet: `--compiled whole`).
trl: trl 0.23.1 in its own environment and processes (`--trl-python`, see compare_trl.py); SD1.5 only.

The variants of a row take turns. Seconds are medians; the spread is the largest minus the smallest. Peak is the most
memory that the allocator handed out. GEMM share is the step's FLOP without recomputation, per second, over the rate of
a large matrix product measured in the same run. The CSV is rewritten after every measurement. Nothing here has run on a
GPU yet.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.ops.errors import is_out_of_memory
from alignprop_fast.ops.garbage import collect_garbage
from alignprop_fast.planner import BudgetInfeasible
from alignprop_fast.runtime import PeakMeter
from benchmarks import RESULTS
from benchmarks.step.chain import provenance
from benchmarks.step.train_step_estimate import estimate
from benchmarks.step.train_step_rows import COLUMNS, Setting, Table, prediction, settings
from benchmarks.step.train_step_table import markdown, plot
from benchmarks.step.train_step_trl import trl_row
from benchmarks.step.train_step_variants import EAGER_WAYS, Bench, step_flop

GIB = 2**30


@dataclass
class Case:
    """One variant of a setting: how to run its step, and its row."""

    row: dict[str, Any]
    run: Callable[[], None]
    limit_bytes: int | None = None  # the allocator's limit
    times: list[float] = field(default_factory=list)


class Clock:
    """The remaining time."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, median of ten."""
    size = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    a @ b
    return 2 * size**3 / statistics.median(seconds_of(lambda: a @ b, device) for _ in range(10))


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def limit_memory(device: torch.device, limit_bytes: int | None) -> None:
    """Limit the memory of the allocator; None: no limit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if limit_bytes is None else min(1.0, limit_bytes / total))


def cases(bench: Bench, setting: Setting, args: argparse.Namespace, common: dict[str, Any]) -> Iterator[Case]:
    """Ours under each budget of the setting, and its rivals, which have no budget."""
    batch, grad_steps = setting.batch, setting.grad_steps
    same = {**common, "model": setting.model, "batch": batch, "steps": bench.steps, "grad_steps": grad_steps}
    for budget in setting.budgets_gib:
        planned_bytes = int(budget * (1 - args.headroom) * GIB)
        row = {**same, "variant": "ours", "budget_gib": budget}
        yield Case(row, partial(bench.ours, batch, grad_steps, planned_bytes), int(budget * GIB))
    for name in setting.rivals:
        if name in args.variants:
            row = {**same, "variant": name, "plan": f"checkpoint {EAGER_WAYS[0]}"}
            yield Case(row, partial(bench.eager, batch, grad_steps, EAGER_WAYS[0], name == "compiled"))


def first_run(case: Case, bench: Bench) -> None:
    """Run once to warm up (ours: also to measure and plan) and once with the meter; errors go into the row."""
    device, row = bench.device, case.row
    limit_memory(device, case.limit_bytes)
    try:
        case.run()
        with PeakMeter(device) as meter:
            case.run()
    except BudgetInfeasible as error:
        row |= {"status": "does not fit", "least_bytes": error.smallest_bytes}
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        row["status"] = "out of memory"
        error.__traceback__ = None
        bench.optimizer.zero_grad(set_to_none=True)
        return
    finally:
        collect_garbage()
    row |= {"status": "ok", "peak_bytes": there_bytes(bench) + meter.peak_bytes}
    if row["variant"] == "ours":
        assert bench.sampler.plan is not None
        row |= prediction(bench.sampler.plan)


def there_bytes(bench: Bench) -> int:
    """Bytes on the device between two steps."""
    if bench.device.type == "cuda":
        return torch.cuda.memory_allocated(bench.device)
    modules = bench.sampler.model.modules()
    state = [t for values in bench.optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())] + state
    return sum(t.numel() * t.element_size() for t in tensors) + bench.reward_bytes


def leaner(case: Case, bench: Bench, setting: Setting) -> None:
    """A rival that ran out of memory, again in the leaner way."""
    way, compiled = EAGER_WAYS[1], case.row["variant"] == "compiled"
    case.row["plan"] = f"checkpoint {way}"
    case.run = partial(bench.eager, setting.batch, setting.grad_steps, way, compiled)
    first_run(case, bench)


def measure(
    bench: Bench, flop_of: dict[str, float], setting: Setting, args: argparse.Namespace, table: Table, clock: Clock
) -> None:
    """Measure all rows of a setting: each once, then in turns. flop_of: as `Bench.flop`."""
    rate = gemm_rate(bench.device, bench.dtype)
    flop = step_flop(flop_of, setting.batch, bench.steps, setting.grad_steps)
    common = {**provenance(bench.device), **versions(), "dtype": str(bench.dtype)[6:], "reward": args.reward}
    common |= {"gemm_tflops": round(rate / 1e12, 3)}
    running = []
    for case in cases(bench, setting, args, common):
        if clock.left() <= 0:
            break
        first_run(case, bench)
        if case.row["status"] == "out of memory" and case.row["variant"] != "ours":
            leaner(case, bench, setting)
        running += [case] if case.row["status"] == "ok" else []
        table.write(case.row)
    for _ in range(args.repeats):
        for case in running:
            if case.times and clock.left() <= 0:
                continue
            limit_memory(bench.device, case.limit_bytes)
            case.times.append(seconds_of(case.run, bench.device))
            case.row |= timed(case.times, setting.batch, flop, rate)
            table.write(case.row)
    limit_memory(bench.device, None)


def timed(times: list[float], batch: int, flop: float, rate: float) -> dict[str, Any]:
    seconds = statistics.median(times)
    return {
        "seconds": round(seconds, 4),
        "spread_seconds": round(max(times) - min(times), 4),
        "repeats": len(times),
        "samples_per_second": round(batch / seconds, 4),
        "gemm_share": round(flop / seconds / rate, 4),
    }


def run(args: argparse.Namespace, table: Table) -> None:
    """Measure the settings, the most important first, until the time is up; one model on the device at a time."""
    device, clock = torch.device(args.device), Clock(args.seconds)
    bench: Bench | None = None
    flop_of: dict[str, float] = {}
    for setting in settings(args.model):
        if clock.left() <= 0:
            print(f"out of time before {setting}")
            break
        if bench is None or bench.model != setting.model:
            bench = None
            collect_garbage()
            limit_memory(device, None)
            steps = setting.steps if args.steps is None else args.steps
            # Counted on tensors without data, because FLOP inside the package's GPU kernels cannot be counted.
            countable = torch.device("cpu" if setting.model == "small" else "meta")
            flop_of = Bench(setting.model, countable, 1, args.reward).flop()
            bench = Bench(setting.model, device, steps, args.reward, args.compiled)
        measure(bench, flop_of, setting, args, table, clock)
        if setting.trl and args.trl_python and "trl" in args.variants and clock.left() > 0:
            common = {**provenance(device), "model": setting.model, "reward": args.reward}
            table.write(trl_row(args.trl_python, setting, bench.steps, args.repeats, common))
        for row in table.rows:
            if (row["model"], row["batch"], row["grad_steps"]) == (setting.model, setting.batch, setting.grad_steps):
                print({key: row.get(key, "") for key in ("variant", "budget_gib", *COLUMNS[11:])}, flush=True)


def versions() -> dict[str, str]:
    try:
        return {"triton": version("triton")}
    except PackageNotFoundError:
        return {"triton": "none"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", choices=("small", "sd15", "sdxl"), default=["sdxl", "sd15"])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--estimate", metavar="GPU", help="plan for this GPU instead of measuring here")
    add("--reward", default=None, help="a published reward's architecture, or mean [hpsv2; small: mean]")
    add("--variants", nargs="+", choices=("eager", "compiled", "trl"), default=("eager", "compiled", "trl"))
    add("--compiled", choices=("blocks", "whole"), default="blocks", help="what torch.compile compiles")
    add("--trl-python", help="python of an environment with trl 0.23.1")
    add("--steps", type=int, help="denoising steps [50; small: 3]")
    add("--repeats", type=int, default=3)
    add("--headroom", type=float, default=0.04, help="share of a budget that the plan leaves for fragmentation")
    add("--seconds", type=float, default=1e9, help="start no measurement after this many seconds")
    add("--output", type=Path, help="CSV to write; the picture goes beside it")
    add("--table", type=Path, help="only print the table of this CSV and draw its picture")
    args = parser.parse_args()
    args.reward = args.reward or ("mean" if args.model == ["small"] else "hpsv2")
    return args


def main() -> None:
    args = parse()
    if args.table is None:
        name = "".join((args.estimate or "").lower().split())
        where = "estimated" if name else "cpu" if args.device == "cpu" else "gpu"
        default = RESULTS / where / (f"train_step_{name}.csv" if name else "train_step.csv")
        table = Table(args.output or default)
        if args.estimate:
            estimate(args.estimate, args.model, args.steps, args.reward, versions(), table)
        else:
            run(args, table)
        table.save()
        args.table = table.file
    with open(args.table, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    if not rows:
        raise SystemExit(f"no row in {args.table}: give more --seconds")
    plot(rows, args.table.with_suffix(".png"))
    print(markdown(rows))


if __name__ == "__main__":
    main()
