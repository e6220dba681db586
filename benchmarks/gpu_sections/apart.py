"""Sections that may break the CUDA context: kernels that have never run, CUDA graphs, pinned memory, torch.compile.

Each runs in its own process, so that it cannot harm the others.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
from typing import Any

import torch

from alignprop_fast.planner import BlockOption, Plan, StageChoice
from alignprop_fast.runtime import link_rate
from benchmarks import ROOT
from benchmarks.gpu_sections.lab import Lab
from benchmarks.gpu_sections.speed import compare, evaluations
from benchmarks.gpu_sections.timing import Call
from benchmarks.step import graphs as graphs_bench
from benchmarks.step import offload as offload_bench
from benchmarks.step.train_step_variants import Bench, prompts_of

TESTS = ("tests/training/test_gpu_memory.py", "tests/runtime/test_graphs.py", "tests/kernels", "tests/ops")
DRY_TESTS = ("--noconftest", "tests/planner/test_gpus.py")


def kernels(lab: Lab) -> None:
    """Every kernel against its reference, in bf16."""
    _examine(lab, "kernels", quick=True)


def doctor(lab: Lab) -> None:
    """The whole examination, in bf16."""
    _examine(lab, "doctor", quick=False)


def _examine(lab: Lab, section: str, quick: bool) -> None:
    from alignprop_fast.doctor import examine

    def tell(what: str) -> None:
        # If the examination hangs, the last fact names the part that hangs.
        lab.facts.write(section, "examines", what=what)

    report = examine(lab.device, quick=quick or lab.dry, dtypes=[torch.bfloat16], tell=tell)
    for check in report.checks:
        lab.facts.write(section, "check", **dataclasses.asdict(check))
    for fact in report.facts:
        values = {"value": fact.value, "number": fact.number, "remedy": fact.remedy}
        lab.facts.write(section, "found", name=fact.name, **values)
    for name, reason in report.off.items():
        lab.facts.write(section, "switched off", name=name, reason=reason, remedy=report.remedies.get(name))
    lab.facts.write(section, "examined", checks=len(report.checks), wrong=report.wrong(), took_seconds=report.seconds)


def graphs(lab: Lab) -> None:
    """A chain launched evaluation by evaluation, and as recorded graphs."""
    for model in ("sd15", "sdxl"):
        rows = graphs_bench.measure(lab.bench(model), 1, 2 if lab.dry else 5)
        for row in rows:
            lab.facts.write("graphs", "chain", model=model, **row)
        if len(rows) == 2:
            seconds = [row["median_seconds"] for row in rows]
            lab.facts.write("graphs", "ratio", model=model, batch=1, ratio=round(seconds[0] / seconds[1], 3))


def offload(lab: Lab) -> None:
    """The hidden share of the copies, and the gradients of every option compared with those of "keep"."""
    bench, link = _one_step(lab), link_rate(lab.device)
    for grade in offload_bench.MEASURED:
        row = offload_bench.measure(bench, 1, grade, link, 2 if lab.dry else 5)
        lab.facts.write("offload", "hidden", link_bytes_per_second=link, **row)
    gradients = _Gradients(bench)
    expected = gradients.of(BlockOption.KEEP)
    # "keep" runs twice: if these differ, the cause is the device, such as kernels that are not deterministic.
    for option in BlockOption:
        lab.facts.write("offload", "gradients", option=option, **_difference(expected, gradients.of(option)))


def _one_step(lab: Lab) -> Bench:
    """A model whose chain has one step, with adapters that are not zero."""
    bench = Bench("small" if lab.dry else "sdxl", lab.device, 1, "mean")
    torch.manual_seed(0)
    for parameter in bench.trained:
        torch.nn.init.normal_(parameter, std=0.02)
    return bench


class _Gradients:
    """Gradients of one image through one step, with the same random numbers each time."""

    def __init__(self, bench: Bench):
        self.bench = bench
        bench.use_stock(False)

    def of(self, option: BlockOption) -> list[torch.Tensor]:
        plan = Plan(
            1,
            (0,),
            (),
            ({"*": option},),
            {},
            decoder=StageChoice("image", {"*": BlockOption.RECOMPUTE}),
            host_bytes=int(option.offload),
        )
        torch.manual_seed(1)
        images = self.bench.sampler(prompts_of(1), plan=plan)
        (images * torch.linspace(0, 1, images.shape[-1], device=images.device)).mean().backward()
        found = [p.grad.clone() for p in self.bench.trained if p.grad is not None]
        self.bench.optimizer.zero_grad(set_to_none=True)
        return found


def _difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> dict[str, Any]:
    """Whether the bits are the same, and the largest difference relative to the largest element of its tensor."""
    pairs = list(zip(expected, found, strict=True))
    relative = [float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs]
    same = all(torch.equal(a, b) for a, b in pairs)
    return {"same_bits": same, "largest_relative": max(relative), "median_relative": statistics.median(relative)}


def compiled(lab: Lab) -> None:
    """torch.compile of the stock model's transformer blocks, beside ours uncompiled."""
    bench = lab.bench("sdxl")
    calls = {call.name: call for call in evaluations(bench, 1)}
    for name in ("stock forward", "stock both"):
        calls[name].prepare = _Compiled(bench, calls[name])
    for name in ("ours forward", "ours both keep"):
        calls[name].prepare = _Uncompiled(bench, calls[name])
    compare(lab, "compile", 1, [calls[n] for n in ("ours forward", "ours both keep", "stock forward", "stock both")])


class _Compiled:
    """Puts the compiled blocks in place before a call of the stock model."""

    on = True

    def __init__(self, bench: Bench, call: Call):
        self.bench, self.before = bench, call.prepare

    def __call__(self) -> None:
        self.before()
        self.bench.compile(self.on)


class _Uncompiled(_Compiled):
    on = False


def tests(lab: Lab) -> None:
    """pytest in its own process; each failure becomes a fact at once."""
    names = DRY_TESTS if lab.dry else TESTS
    # -P keeps the root off the path, because its folder `kernels` looks like a package of that name.
    command = [sys.executable, "-P", "-m", "pytest", "-vv", "--tb=line", "-p", "no:cacheprovider", *names]
    run = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True
    )
    counts = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0}
    last = ""
    try:
        assert run.stdout is not None
        for line in run.stdout:
            last = line.strip() or last
            for word in counts:
                if f" {word}" in line and "::" in line and not line.startswith(word):
                    counts[word] += 1
                    if word in ("FAILED", "ERROR"):
                        lab.facts.write("tests", "failure", test=line.split()[0], how=word)
            if "Error" in line and "::" not in line and counts["FAILED"] <= 50:
                lab.facts.write("tests", "reason", line=line.strip()[:300])
        run.wait()
    finally:  # also at the deadline
        run.kill()
        lab.facts.write("tests", "counts", **counts, exit_code=run.returncode, last=last[:200])
