"""Plans of the transformers that people train, by GPU, base and memory, estimated. Needs no GPU.

    python -m benchmarks.step.model_plans --output benchmarks/results/estimated/model_plans.csv

Each row is what `alignprop-fast plan --model MODEL --gpu GPU --base-dtype BASE --memory-budget SIZE --batch-size 1
--reward hpsv2` says, in seconds and bytes: the model's own picture size, steps, guidance and truncation rule, and
adapters of rank 4 on attention. `least_gib` is the smallest budget, where that of the row is too small. Nothing is
offloaded to the host, whose memory differs between computers. Rows in the file are kept, so a run can be continued.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from alignprop_fast.cli.counting import Counting
from alignprop_fast.cli.options import make_config
from alignprop_fast.cli.parts import resolved
from alignprop_fast.cli.plan_options import PlanOptions
from alignprop_fast.cli.plan_summary import predict
from alignprop_fast.planner import BudgetInfeasible, CountedTable, Gpu, budget_on, find_gpu
from benchmarks.rows import KeptRows

GIB = 2**30
MODELS = {
    "z-image-turbo": ("auto", "fp8"),
    "flux2-klein-4b": ("auto", "fp8"),
    "flux2-klein-9b": ("auto", "fp8"),
    "flux2-dev": ("fp8",),
    "qwen-image": ("auto", "fp8"),
    "krea2": ("auto", "fp8"),
    "chroma": ("auto", "fp8"),
    "lumina2": ("auto",),
    "sana": ("auto",),
}
GPU_NAMES = ("RTX 4090", "RTX 5090", "A100 80GB", "H100 SXM")
SIZES_GB = (12, 16, 24, 32, 40, 48, 80)


def counted(options: PlanOptions) -> CountedTable:
    """The costs of a training step on any GPU."""
    config = make_config(options, "meta", "")
    return Counting(Console(quiet=True), options, config, find_gpu(GPU_NAMES[0])).tables()[options.batch_size]


def rows(base: str, gpu: Gpu, options: PlanOptions, costs: CountedTable) -> Iterator[dict[str, Any]]:
    """A row for each budget that the GPU has."""
    table = replace(costs.on(gpu), host_limit_bytes=0)
    steps = options.num_inference_steps
    assert steps is not None
    for size in (one for one in SIZES_GB if one <= -(-gpu.memory_bytes // GIB)):
        budget, _ = budget_on(gpu.name, gpu.memory_bytes, size * GIB)
        row: dict[str, Any] = {"model": options.model, "base": base, "gpu": gpu.name, "size_gb": size}
        row |= {"budget_gib": round(budget / GIB, 2), "steps": steps, "guidance": options.guidance_scale}
        row |= dict.fromkeys(("seconds", "worst_seconds", "peak_gib", "resident_steps", "least_gib"), "")
        try:
            found = predict(table, steps, options.truncation, 1, budget)
        except BudgetInfeasible as error:
            yield row | {"least_gib": round(error.smallest_bytes / GIB, 2)}
            continue
        worst, mean = found.worst, found.expected
        row |= {"seconds": round(mean.seconds, 2), "worst_seconds": round(worst.seconds, 2)}
        yield row | {"peak_gib": round(worst.peak_bytes / GIB, 2), "resident_steps": len(worst.resident_steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="CSV file")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--gpus", nargs="+", default=GPU_NAMES)
    arguments = parser.parse_args()
    kept = KeptRows(arguments.output, ("model", "base", "gpu"))
    for model in arguments.models:
        for base in MODELS[model]:
            name = base.replace("auto", "bf16")
            missing = [gpu for gpu in map(find_gpu, arguments.gpus) if not kept.has(model, name, gpu.name)]
            if not missing:
                continue
            options = resolved(PlanOptions(model=model, base_dtype=base, batch_size=1, reward="hpsv2"), "bf16")
            costs = counted(options)
            for gpu in missing:
                found = list(rows(name, gpu, options, costs))
                print(*found, sep="\n", flush=True)
                kept.add(found)


if __name__ == "__main__":
    main()
