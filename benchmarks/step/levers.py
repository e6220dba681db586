"""What each lever saves of a training step, by the planner's estimate. Needs no GPU.

    python -m benchmarks.step.levers --output benchmarks/results/estimated/levers.csv

A training step of 50 denoising steps, 25 of them without gradient, at the model's native size and batch 1, with
adapters on the attention's projections, in bf16. FLUX does not fit an RTX 4090 in bf16, so there its base is
stored in fp8 (int8 for the lever int8), and the lever needs no second copy of the weights.

Levers: text, always on: keys and values of the text are projected once (none: in each step). Each of the others alone
beside it. merged, int8 and fp8: `--sampling-precision`. graphs: `--cuda-graphs auto`. host: `--host-memory`; the other
rows have none. all: fp8, graphs and 64 GiB of host memory. The budget is the card's whole memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.generate.cost_table import roofline_on
from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.models.architectures import architecture
from alignprop_fast.models.lean.attention import over_a_text
from alignprop_fast.models.lean.quantization import quantize_linears
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.planner import CostTable, Gpu, Plan, Solver, budget_on, find_gpu, roofline_seconds, seconds_on
from alignprop_fast.runtime import Work, trace
from benchmarks.rows import write_rows

STEPS, GRAD_STEPS = 50, 25
META, GIB = torch.device("meta"), 2**30


def sampler_of(model: str, rank: int, base: str | None, precision: str = "exact") -> DifferentiableSampler:
    pipe = architecture(model).pipe
    denoiser = pipe.components.get("unet") or pipe.transformer
    if base is not None:
        quantize_linears(denoiser, base, META, torch.bfloat16)
    if not getattr(denoiser, "peft_config", None):
        add_lora(pipe, rank, rank)
    return DifferentiableSampler(pipe, STEPS, memory_budget=None, cache_text=True, sampling_precision=precision)


def seconds(run: Callable[[], Any], gpu: Gpu) -> float:
    """Estimated seconds of a run without gradient."""

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        run()
        return torch.empty(0)

    return seconds_on(gpu)(trace(Work(forward, None, (), META), {}).seconds)


def closed(sampler: DifferentiableSampler, gpu: Gpu) -> float:
    """Estimated seconds of one step without gradient."""
    chain, x = sampler._blank_step(1, None).chain, sampler.model.initial_latents(1, sampler.size, None, None)
    if chain.precision is not None:
        chain.precision.decide_by(partial(roofline_on, gpu))
    with chain.approximation():
        return seconds(partial(chain.predict, 0, x), gpu)


def text(sampler: DifferentiableSampler, gpu: Gpu) -> tuple[float, int]:
    """Estimated seconds of the text's projections in one step, and bytes of their results."""
    embeds = sampler.text.blank(1, None).embeds
    found: list[torch.Tensor] = []

    def project() -> None:
        for attn in over_a_text(sampler.model.denoiser):
            found.extend((attn.to_k(embeds), attn.to_v(embeds)))

    return seconds(project, gpu), sum(t.numel() * t.element_size() for t in found)


def merging(sampler: DifferentiableSampler, rank: int, gpu: Gpu) -> float:
    """Estimated seconds of adding all adapters into their second copies."""
    assert sampler.precision is not None
    size_bytes = sampler.precision.size_bytes
    return roofline_seconds(rank * size_bytes, 2 * size_bytes, gpu, "bfloat16")


def planned(table: CostTable, gpu: Gpu, closed_seconds: float, size_bytes: int) -> Plan:
    """The plan with this many seconds per step without gradient, and these bytes more."""
    fixed = {**table.fixed, "conditioning": table.fixed["conditioning"] + size_bytes}
    table = replace(table, fixed=fixed, closed_seconds=closed_seconds, closed_bytes=table.sampling_bytes)
    budget = budget_on(gpu.name, gpu.memory_bytes, None)[0]
    return Solver(table, STEPS, GRAD_STEPS).plan(range(STEPS - GRAD_STEPS, STEPS), budget)


def rows(model: str, rank: int, gpu: Gpu) -> list[dict[str, Any]]:
    base = "fp8" if model == "flux-dev" and gpu.name == "RTX 4090" else None
    sampler = sampler_of(model, rank, base)
    given = sampler.cost_table(1, gpu)
    table = replace(given, graphs=None, host_limit_bytes=0)
    exact = table.sampling_seconds
    text_seconds, text_bytes = text(sampler, gpu)
    found = [("none", table, exact + text_seconds, -text_bytes, 0.0), ("text", table, exact, 0, text_seconds)]
    for kind in ("merged", "int8", "fp8"):
        other = sampler_of(model, rank, base if kind == "merged" else base and kind, kind)
        assert other.precision is not None
        once = merging(other, rank, gpu) if kind == "merged" else 0.0
        found.append((kind, table, closed(other, gpu), other.precision.size_bytes, once))
    fp8 = found[-1][2:4]
    found.append(("graphs", replace(table, graphs=given.graphs), exact, 0, 0.0))
    found += [(f"host {gib} GiB", replace(table, host_limit_bytes=gib * GIB), exact, 0, 0.0) for gib in (16, 64)]
    found.append(("all", replace(given, host_limit_bytes=64 * GIB), *fp8, 0.0))
    result = []
    for lever, costs, per_step, size_bytes, once in found:
        plan = planned(costs, gpu, per_step, size_bytes)
        row: dict[str, Any] = {"model": model, "rank": rank, "gpu": gpu.name, "base": base or "bf16", "lever": lever}
        row |= {"more_bytes": size_bytes, "closed_step_ms": round(per_step * 1e3, 2), "once_ms": round(once * 1e3, 2)}
        row |= {"training_step_seconds": round(plan.seconds + once, 3), "host_gib": round(plan.host_bytes / GIB, 2)}
        result.append(row | {"resident_steps": len(plan.resident_steps)})
        print(result[-1], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="CSV file")
    parser.add_argument("--models", nargs="+", default=["sd15", "sdxl", "flux-dev"])
    parser.add_argument("--gpus", nargs="+", default=["RTX 4090", "H100"])
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    arguments = parser.parse_args()
    gpus = [find_gpu(name) for name in arguments.gpus]
    found = [row for model in arguments.models for gpu in gpus for row in rows(model, arguments.rank, gpu)]
    write_rows(arguments.output, found)


if __name__ == "__main__":
    main()
