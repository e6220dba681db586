"""Seconds of a chain with one gradient step, its other evaluations launched one by one or as a CUDA graph.

    python -m benchmarks.step.graphs --model sd15 --output graphs.csv          # on a GPU
    python -m benchmarks.step.graphs --model small --device cpu                # dry run: without graphs

Runs take turns; seconds are medians. This has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignprop_fast import DifferentiableSampler
from alignprop_fast.runtime import PeakMeter
from benchmarks.rows import write_rows
from benchmarks.step.chain import provenance
from benchmarks.step.train_step import seconds_of
from benchmarks.step.train_step_variants import ETA, GUIDANCE, Bench, prompts_of


def measure(bench: Bench, batch: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each way that the device supports.

    It has the seconds of a chain, the peak bytes above the weights, and the largest difference from the first way's
    image.
    """
    ways = {"eager": "off", "graphs": "on"} if bench.device.type == "cuda" else {"eager": "off"}
    samplers = {
        name: DifferentiableSampler(bench.pipe, bench.steps, GUIDANCE, ETA, None, cuda_graphs=way)
        for name, way in ways.items()
    }
    for sampler in samplers.values():
        vars(sampler.model)["encode"] = lambda batch: bench.conditioning(len(batch.prompts))

    def step(sampler: DifferentiableSampler) -> torch.Tensor:
        torch.manual_seed(0)
        images = sampler(prompts_of(batch), grad_steps=(bench.steps - 1,))
        images.mean().backward()
        bench.optimizer.zero_grad(set_to_none=True)
        return images.detach()

    rows: list[dict[str, Any]] = []
    first: torch.Tensor | None = None
    for name, sampler in samplers.items():
        step(sampler)
        with PeakMeter(bench.device) as meter:
            images = step(sampler)
        first = images if first is None else first
        difference = float((images - first).abs().max())
        rows.append({"batch": batch, "steps": bench.steps, "how": name, "peak_bytes": meter.peak_bytes})
        rows[-1]["difference"] = difference
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(repeats):
        for name, sampler in samplers.items():
            times[name].append(seconds_of(partial(step, sampler), bench.device))
    for row in rows:
        row["median_seconds"] = round(statistics.median(times[row["how"]]), 4)
        row["spread_seconds"] = round(max(times[row["how"]]) - min(times[row["how"]]), 4)
    return rows


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
    rows: list[dict[str, Any]] = []
    for batch in args.batches:
        rows += [{**provenance(device), "model": args.model, **row} for row in measure(bench, batch, args.repeats)]
        print(*rows[-2:], sep="\n", flush=True)
    if args.output:
        write_rows(args.output, rows)


if __name__ == "__main__":
    main()
