"""Training steps of SDXL: the plan, its prediction and the measurement, and the same step written with diffusers."""

from __future__ import annotations

import time
from functools import partial

import torch

from alignprop_fast.planner import BudgetInfeasible
from benchmarks.gpu_sections.flop import FLOP
from benchmarks.gpu_sections.lab import Lab
from benchmarks.gpu_sections.timing import Call, first_run, in_turns, ratio
from benchmarks.step.train_step_rows import prediction
from benchmarks.step.train_step_variants import EAGER_WAYS, Bench, step_flop

HEADROOM = 0.04  # share of a budget, left for fragmentation


def plan(lab: Lab) -> None:
    """Cost table, plan and a step at batch 1 on 24 GiB."""
    _planned(lab, "plan", 1)


def batch4(lab: Lab) -> None:
    """The same at batch 4, where the richer options do not fit while they are measured."""
    _planned(lab, "batch4", 4)


def _planned(lab: Lab, section: str, batch: int) -> None:
    bench = lab.bench("sdxl")
    budget_bytes = int(lab.cap_bytes * (1 - HEADROOM))
    with lab.capped(lab.cap_bytes):
        bench.use_stock(False)
        bench.sampler.set_budget(budget_bytes)
        began = time.perf_counter()
        solver = bench.sampler.solver(batch)
        taken = time.perf_counter() - began
        budget_bytes = bench.sampler.settled_budget(batch) or budget_bytes
        reserved = torch.cuda.max_memory_reserved(lab.device) if lab.device.type == "cuda" else None
        options = sorted({option.name for segment in solver.table.step for option in segment.options})
        decoders = [stage.name for stage in solver.table.decoders]
        same = {"batch": batch, "cap_bytes": lab.cap_bytes}
        measured = {"seconds": taken, "options": options, "decoders": decoders, "peak_reserved_bytes": reserved}
        lab.facts.write(section, "cost table", **measured, **same)
        try:
            found = solver.plan(range(bench.steps - lab.grad_steps, bench.steps), budget_bytes)
        except BudgetInfeasible as error:
            lab.facts.write(section, "does not fit", least_bytes=error.smallest_bytes, **same)
            return
        lab.facts.write(section, "plan", **prediction(found), **same)
        call = _ours(lab, bench, batch, budget_bytes)
        peaks = first_run(call, lab.device)
        lab.facts.write(section, "step peak", **peaks, predicted_peak_bytes=found.peak_bytes, **same)
        if "out_of_memory" not in peaks:
            call.once(lab.device)
            figures = call.figures(lab.rate())
            lab.facts.write(section, "step", **figures, predicted_seconds=found.seconds, **_chain(lab), **same)


def _chain(lab: Lab) -> dict[str, int]:
    return {"steps": lab.steps, "grad_steps": lab.grad_steps}


def _ours(lab: Lab, bench: Bench, batch: int, budget_bytes: int) -> Call:
    run = partial(bench.ours, batch, lab.grad_steps, budget_bytes)
    return Call("ours", run, flop=step_flop(FLOP[bench.model], batch, bench.steps, lab.grad_steps))


def eager(lab: Lab) -> None:
    """The chain with diffusers, PEFT and checkpoints beside ours, with 24 GiB and with all memory."""
    bench = lab.bench("sdxl")
    total = torch.cuda.get_device_properties(lab.device).total_memory if lab.device.type == "cuda" else 2**40
    for cap_bytes in (lab.cap_bytes, None):
        with lab.capped(cap_bytes):
            _beside(lab, bench, cap_bytes, int((cap_bytes or total) * (1 - HEADROOM)))


def _beside(lab: Lab, bench: Bench, cap_bytes: int | None, budget_bytes: int) -> None:
    """One run each for the peaks, then two each in turns. A rival that does not fit is tried again in a leaner way."""
    bench.use_stock(False)
    bench.sampler.set_budget(budget_bytes)
    ours = _ours(lab, bench, 1, bench.sampler.settled_budget(1) or budget_bytes)
    same = {"cap_bytes": cap_bytes, "batch": 1, **_chain(lab)}
    stock = [(Call("stock", partial(bench.eager, 1, lab.grad_steps, way), flop=ours.flop), way) for way in EAGER_WAYS]
    running: list[Call] = []
    for call, way in (*stock, (ours, "planned")):
        if call.name in [other.name for other in running]:
            continue
        peaks = first_run(call, lab.device, warm=False)
        lab.facts.write("eager", "peak", call=call.name, way=way, **peaks, **same)
        running += [] if "out_of_memory" in peaks else [call]
    in_turns(running, lab.device, 2, 0.0)
    for call in running:
        lab.facts.write("eager", "time", call=call.name, **call.figures(lab.rate()), **same)
    if len(running) == 2:
        lab.facts.write("eager", "ratio", slower="stock", faster="ours", **ratio(*running), **same)
