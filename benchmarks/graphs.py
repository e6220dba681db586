"""Evaluations without gradient launched one by one and as a CUDA graph: seconds of a chain with one gradient step.

    python benchmarks/graphs.py --model sd15 --output graphs.csv          # on a GPU
    python benchmarks/graphs.py --model small --device cpu                # dry run: without graphs

Runs take turns; medians. Has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chain import provenance
from train_step import seconds_of
from train_step_variants import ETA, GUIDANCE, Bench, prompts_of

from alignprop_fast import DifferentiableSampler
from alignprop_fast.runtime import PeakMeter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", "sd15", "sdxl"), default="sd15")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV to write")
    args = parser.parse_args()
    device = torch.device(args.device)
    bench = Bench(args.model, device, args.steps, "mean")
    samplers = {"eager": bench.sampler}
    if device.type == "cuda":
        samplers["graphs"] = DifferentiableSampler(bench.pipe, args.steps, GUIDANCE, ETA, None, cuda_graphs=True)
        vars(samplers["graphs"].model)["encode"] = lambda prompts, *_: bench.conditioning(len(prompts))
    rows: list[dict[str, Any]] = []
    for batch in args.batches:

        def step(sampler: DifferentiableSampler, batch: int = batch) -> None:
            sampler(prompts_of(batch), grad_steps=(args.steps - 1,)).mean().backward()
            bench.optimizer.zero_grad(set_to_none=True)

        times: dict[str, list[float]] = {name: [] for name in samplers}
        own = []
        for name, sampler in samplers.items():
            step(sampler)
            with PeakMeter(device) as meter:
                step(sampler)
            own.append({**provenance(device), "model": args.model, "batch": batch, "steps": args.steps, "how": name})
            own[-1]["peak_bytes"] = meter.peak_bytes
        for _ in range(args.repeats):
            for name, sampler in samplers.items():
                times[name].append(seconds_of(partial(step, sampler), device))
        for row in own:
            row["median_seconds"] = round(statistics.median(times[row["how"]]), 4)
            print(row, flush=True)
        rows += own
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
