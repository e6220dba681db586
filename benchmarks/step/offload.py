"""How much of the time for copies to and from host memory is hidden by computation, for one gradient step.

    python -m benchmarks.step.offload --model sdxl --output offload.csv        # on a GPU
    python -m benchmarks.step.offload --model small --device cpu               # dry run

Hidden: 1 - (seconds offloaded - seconds kept) / seconds of the copies alone. Runs take turns; seconds are medians. The
chain has one resident step, under each option with and without offloading. This has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.planner import GRADES, BlockOption, Plan, StageChoice
from alignprop_fast.runtime import PeakMeter, link_rate
from benchmarks.rows import write_rows
from benchmarks.step.chain import provenance
from benchmarks.step.train_step import seconds_of
from benchmarks.step.train_step_variants import Bench, prompts_of

MEASURED = (BlockOption.KEEP, BlockOption.GEGLU, BlockOption.QKV)


def measure(bench: Bench, batch: int, grade: BlockOption, link: float | None, repeats: int) -> dict[str, Any]:
    """One row: seconds and peak above the weights of a kept and an offloaded step, bytes moved, hidden share."""
    sampler = bench.sampler
    decoder = StageChoice("image", {"*": BlockOption.RECOMPUTE})

    def step(option: BlockOption) -> None:
        plan = Plan(1, (0,), (), ({"*": option},), {}, decoder=decoder, host_bytes=int(option.offload))
        sampler(prompts_of(batch), plan=plan).mean().backward()
        bench.optimizer.zero_grad(set_to_none=True)

    names, peaks = (grade, grade.offloaded), []
    times: tuple[list[float], list[float]] = ([], [])
    sampler.renderer._host_pool = None
    for name in names:
        step(name)
        with PeakMeter(bench.device) as meter:
            step(name)
        peaks.append(meter.peak_bytes)
    for _ in range(repeats):
        for name, found in zip(names, times, strict=True):
            found.append(seconds_of(partial(step, name), bench.device))
    kept, offloaded = map(statistics.median, times)
    moved_bytes = sampler.renderer.host_pool.size_bytes
    copy_seconds = 2 * moved_bytes / link if link else 0.0
    return {
        "option": grade,
        "kept_seconds": round(kept, 4),
        "offloaded_seconds": round(offloaded, 4),
        "moved_bytes": moved_bytes,
        "copy_seconds": round(copy_seconds, 4),
        "hidden": round(1 - (offloaded - kept) / copy_seconds, 3) if copy_seconds else "",
        "kept_peak_bytes": peaks[0],
        "offloaded_peak_bytes": peaks[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", "sd15", "sdxl"), default="sd15")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--options", nargs="+", type=BlockOption, choices=GRADES, default=MEASURED)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV to write")
    args = parser.parse_args()
    device = torch.device(args.device)
    bench, link = Bench(args.model, device, 1, "mean"), link_rate(device)
    same = {**provenance(device), "model": args.model, "batch": args.batch_size, "link": round(link or 0)}
    rows = []
    for grade in args.options:
        rows.append({**same, **measure(bench, args.batch_size, grade, link, args.repeats)})
        print(rows[-1], flush=True)
    if args.output:
        write_rows(args.output, rows)


if __name__ == "__main__":
    main()
