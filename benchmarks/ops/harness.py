"""The common part of all op benches: correctness first, then alternating timing, memory, rates, provenance, CSV.

A bench names its shapes and makes a `Problem` of each; `main` does the rest. Implementations take turns call by call,
so that a drifting clock or a busy machine affects all alike. On a GPU a large buffer is written between two calls,
which empties the L2 cache and hides the launch. If the error of "ours" against float64 exceeds its bound, nothing is
timed. An implementation whose results at the timed shape differ from "eager" is not timed either.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.ops.errors import OutOfMemory, unless_out_of_memory
from alignprop_fast.runtime import PeakMeter
from benchmarks.provenance import commit

Tensor = torch.Tensor
Implementation = Callable[..., Any]
FLUSH_BYTES = 512 * 2**20
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Shape:
    """One shape of a model: the sizes after the batch dimension, and the rows of the batch per image."""

    model: str
    sizes: tuple[int, ...]
    rows: int = 2  # a pair under classifier-free guidance
    check_sizes: tuple[int, ...] | None = None  # smaller sizes, if float64 at full size would not fit


@dataclass(frozen=True)
class Work:
    """The work that the algorithm cannot avoid: bytes to and from memory, and FLOP of matrix products."""

    moved_bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Problem:
    """One op at one shape. Implementations take `inputs`; "ours" and "eager" (the reference) must be among them."""

    inputs: tuple[Tensor, ...]
    learning: int  # number of leading inputs that get gradients; 0: the op has no backward pass
    implementations: dict[str, Implementation]
    forward: Work
    backward: Work = field(default_factory=Work)
    own_inputs: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)  # for peers that take another form

    def inputs_of(self, name: str) -> tuple[Tensor, ...]:
        """The inputs of this implementation; the first `learning` of them get gradients."""
        return self.own_inputs.get(name, self.inputs)


Make = Callable[..., Problem]
"""make(batch, *sizes, dtype=..., device=...)"""


def optional(module: str) -> Any:
    """The module, or None if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def randn(*shape: int, like: tuple[torch.dtype, torch.device], scale: float = 1.0) -> Tensor:
    """Normal numbers from the global generator. like: (dtype, device)."""
    return torch.randn(*shape, dtype=torch.float32, device=like[1]).mul_(scale).to(like[0])


def provenance(device: torch.device) -> dict[str, str]:
    """Device, versions and commit ("+" if the checkout has changes)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"gpu": name, "torch": torch.__version__, "triton": triton, "commit": commit()}


def alternate(
    calls: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, list[float] | str]:
    """Seconds of each call, in turns for about `seconds` in total; or the reason why it cannot run."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    times: dict[str, list[float] | str] = {}
    for name, call in calls.items():
        try:
            for _ in range(2):  # the first call compiles
                call()
            times[name] = []
        except Exception as error:  # peers raise anything; the row says what
            times[name] = f"cannot run: {type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
    running = [name for name in calls if isinstance(times[name], list)]
    start, rounds = time.perf_counter(), 0
    while running and (rounds < 3 or (time.perf_counter() - start < seconds and rounds < 200)):
        taken = [_one(calls[name], flush) for name in running]
        for name, value in zip(running, taken, strict=True):
            series = times[name]
            assert isinstance(series, list)
            series.append(value())
        rounds += 1
    return times


def _one(call: Callable[[], object], flush: Tensor | None) -> Callable[[], float]:
    """Run once. The returned function gives the seconds; on a GPU it waits for them."""
    if flush is None:
        begin = time.perf_counter()
        call()
        taken = time.perf_counter() - begin
        return lambda: taken
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    flush.zero_()
    events[0].record()
    call()
    events[1].record()

    def seconds() -> float:
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1000

    return seconds


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The 0.2, 0.5 and 0.8 quantiles, interpolated."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def denominators(dtype: torch.dtype, device: torch.device, small: bool) -> tuple[float, float]:
    """(bytes per second of a large copy, FLOP per second of a large square product), measured now."""
    n, size = (2**22, 512) if small or device.type == "cpu" else (2**28, 8192)
    source, target = torch.zeros(n, dtype=dtype, device=device), torch.empty(n, dtype=dtype, device=device)
    a = torch.randn(size, size, device=device).to(dtype)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "product": lambda: a @ a}
    times = alternate(calls, device, 0.5)
    copy, product = (statistics.median(t) if isinstance(t, list) else float("inf") for t in times.values())
    return 2 * n * dtype.itemsize / copy, 2 * size**3 / product


def errors(problem: Problem) -> tuple[float, float]:
    """(largest error of "ours" over its bound, that error), over the outputs and all gradients.

    The bound is twice the error of "eager" in the same dtype, plus 1e-6. Errors are against "eager" in float64.
    """
    eager = problem.implementations["eager"]
    exact = _results(eager, [t.detach().double() for t in problem.inputs], problem.learning, problem.inputs[0].dtype)
    ours, plain = (
        _results(fn, [t.detach() for t in problem.inputs], problem.learning, problem.inputs[0].dtype)
        for fn in (problem.implementations["ours"], eager)
    )
    worst = (0.0, 0.0)
    for a, b, c in zip(ours, plain, exact, strict=True):
        error, allowed = (float((t.double() - c).abs().max()) for t in (a, b))
        ratio = error / (2 * allowed + 1e-6)
        # NaN must win.
        worst = worst if ratio <= worst[0] else (ratio, error)
    return worst


def wrong_at_size(problem: Problem) -> dict[str, str]:
    """By name, implementations whose results at the timed shape differ from "eager" by more than rounding.

    A kernel that is right on small tensors may skip rows of large ones. Both round in different orders, so sixteen
    times the dtype's epsilon of the largest number is accepted. Results of another shape are a peer's own form and
    pass.
    """
    dtype = problem.inputs[0].dtype
    eager = _results(problem.implementations["eager"], _leaves(problem, "eager"), problem.learning, dtype)
    wrong: dict[str, str] = {}
    for name, fn in problem.implementations.items():
        try:
            found = _results(fn, _leaves(problem, name), problem.learning, dtype)
        except Exception:  # its row will say why
            continue
        for i, (ours, theirs) in enumerate(zip(found, eager, strict=False)):
            if ours.shape != theirs.shape:
                continue
            error, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
            if not error <= 16 * torch.finfo(dtype).eps * largest + 1e-6:
                wrong[name] = f"result {i} is off by {error:.2g}, of {largest:.2g}"
    return wrong


def _leaves(problem: Problem, name: str) -> list[Tensor]:
    return [t.detach() for t in problem.inputs_of(name)]


def _results(fn: Implementation, inputs: list[Tensor], learning: int, rounded_to: torch.dtype) -> list[Tensor]:
    leaves = [t.requires_grad_(i < learning) for i, t in enumerate(inputs)]
    y = fn(*leaves)
    outputs = list(y) if isinstance(y, tuple) else [y]
    if not learning:
        return outputs
    gradients = _gradients_of(outputs, rounded_to)
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves[:learning], gradients)]


def _gradients_of(outputs: list[Tensor], rounded_to: torch.dtype) -> list[Tensor]:
    """The same numbers for every implementation and dtype."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    draws = [torch.randn(o.shape, generator=generator, device=o.device) for o in outputs]
    return [draw.to(rounded_to).to(o.dtype) for draw, o in zip(draws, outputs, strict=True)]


def _calls(problem: Problem, direction: str) -> dict[str, Callable[[], object]]:
    """Each implementation in one direction, bound to the inputs."""

    def forward(name: str) -> Callable[[], object]:
        return lambda: problem.implementations[name](*problem.inputs_of(name))

    def backward(name: str) -> Callable[[], object]:
        leaves = problem.inputs_of(name)[: problem.learning]
        graph: list[Any] = []

        def call() -> object:
            if not graph:
                y: Any = forward(name)()
                outputs = list(y) if isinstance(y, tuple) else [y]
                graph.extend([outputs, _gradients_of(outputs, outputs[0].dtype)])
            return torch.autograd.grad(graph[0], leaves, graph[1], retain_graph=True, allow_unused=True)

        return call

    return {name: (forward if direction == "forward" else backward)(name) for name in problem.implementations}


def _memory(problem: Problem, name: str, device: torch.device) -> dict[str, int | str]:
    """Bytes alive after the forward pass, with the output, and the peak of both passes, without the inputs."""
    if device.type == "cpu" and name == "compile":
        return {"kept_bytes": "", "peak_bytes": ""}  # the CPU's meter cannot see into compiled code
    with PeakMeter(device) as meter:
        y = problem.implementations[name](*problem.inputs_of(name))
        kept_bytes = meter.live_bytes()
        if problem.learning:
            outputs = list(y) if isinstance(y, tuple) else [y]
            leaves = problem.inputs_of(name)[: problem.learning]
            torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)
    return {"kept_bytes": kept_bytes, "peak_bytes": meter.peak_bytes}


def measure(problem: Problem, device: torch.device, seconds: float, rates: tuple[float, float]) -> list[dict[str, Any]]:
    """One row for each direction and implementation."""
    for name in problem.implementations:
        for leaf in problem.inputs_of(name)[: problem.learning]:
            leaf.requires_grad_()
    rows = []
    wrong = wrong_at_size(problem)
    for direction in DIRECTIONS[: 2 if problem.learning else 1]:
        work = getattr(problem, direction)
        floors = {"bandwidth": work.moved_bytes / rates[0], "gemm": work.flops / rates[1]}
        bound = max(floors, key=lambda name: floors[name])
        calls = {name: call for name, call in _calls(problem, direction).items() if name not in wrong}
        refused = {name: f"WRONG at this shape: {fault}, no speed" for name, fault in wrong.items()}
        for name, times in {**alternate(calls, device, seconds), **refused}.items():
            row: dict[str, Any] = {"direction": direction, "implementation": name, "bound": bound}
            if isinstance(times, str):
                rows.append({**row, "status": times})
                continue
            low, middle, high = quantiles(times)
            row |= {"status": "ok", "p20_ms": 1e3 * low, "p50_ms": 1e3 * middle, "p80_ms": 1e3 * high}
            rows.append({**row, "fraction": floors[bound] / middle, **_memory(problem, name, device)})
    return rows


COLUMNS = (
    *("op", "model", "batch", "sizes", "dtype", "direction", "implementation", "status", "p20_ms", "p50_ms", "p80_ms"),
    *("fraction", "bound", "kept_bytes", "peak_bytes", "error", "error_over_bound"),
    *("copy_GBps", "gemm_TFLOPs", "gpu", "torch", "triton", "commit"),
)


def run(op: str, shapes: Sequence[Shape], make: Make, args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of every shape and batch as they are measured."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rates = denominators(dtype, device, args.small)
    print(f"{op}: copy {rates[0] / 1e9:.0f} GB/s, product {rates[1] / 1e12:.2f} TFLOP/s in {args.dtype}")
    common = {**provenance(device), "op": op, "dtype": args.dtype}
    common |= {"copy_GBps": rates[0] / 1e9, "gemm_TFLOPs": rates[1] / 1e12}
    for shape in shapes:
        torch.manual_seed(0)
        try:
            ratio, error = errors(make(1, *(shape.check_sizes or shape.sizes), dtype=dtype, device=device))
            fault = "" if ratio <= 1 else f"error {error:.2g}"
        except Exception as failure:  # a shape that cannot run must not end the others
            ratio = error = float("nan")
            fault = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0][:100]}"
        for batch in args.batches:
            here = {"model": shape.model, "batch": batch, "sizes": "x".join(map(str, shape.sizes))}
            here |= {"error": error, "error_over_bound": ratio, **common}
            if fault:
                yield [{**here, "implementation": "ours", "status": f"WRONG: {fault}, no speed"}]
                continue
            rows = unless_out_of_memory(partial(_rows_of, shape, batch, make, args, rates))
            if isinstance(rows, OutOfMemory):  # the next shape may fit
                rows = [{"implementation": "ours", "status": f"cannot run: {rows.reason}"}]
            yield [{**here, **row} for row in rows]


def _rows_of(
    shape: Shape, batch: int, make: Make, args: argparse.Namespace, rates: tuple[float, float]
) -> list[dict[str, Any]]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    problem = make(batch * shape.rows, *shape.sizes, dtype=dtype, device=device)
    if args.compile:
        torch._dynamo.reset()
        problem.implementations["compile"] = torch.compile(problem.implementations["eager"], dynamic=False)
    return measure(problem, device, args.seconds, rates)


def _show(row: dict[str, Any]) -> None:
    label = f"{row['op']} {row['model']} b{row['batch']} {row['sizes']}"
    name = f"{row.get('direction', ''):8} {row['implementation']:16}"
    speed = f"{row['p50_ms']:9.3f} ms {row['fraction']:6.1%}" if row["status"] == "ok" else row["status"]
    print(f"{label:52} {name} {speed}", flush=True)


def main(op: str, shapes: Sequence[Shape], small: Sequence[Shape], make: Make) -> None:
    """The command line of one bench; exit code 1 if ours is wrong."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--small", action="store_true", help="toy sizes: a dry run, no figures")
    parser.add_argument("--models", nargs="+", metavar="WORD", help="only models whose name contains this word")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="images per call")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for one shape and direction")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile as a peer"
    )
    parser.add_argument("--output", type=Path, help="CSV to write")
    args = parser.parse_args()
    chosen = small if args.small else shapes
    wanted = [s for s in chosen if not args.models or any(w.lower() in s.model.lower() for w in args.models)]
    if not wanted:
        parser.error(f"no shape of {' or '.join(args.models)}; there are {', '.join({s.model for s in chosen})}")
    output = args.output or Path(os.devnull)
    output.parent.mkdir(parents=True, exist_ok=True)
    right = True
    with open(output, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for rows in run(op, wanted, make, args):
            writer.writerows(rows)
            file.flush()  # what was measured stays, should the time run out
            for row in rows:
                _show(row)
                right &= not row["status"].startswith("WRONG")
    sys.exit(0 if right else 1)
