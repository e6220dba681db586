"""The common part of all op benches: correctness first, then alternating timing, memory, rates, provenance, CSV.

A bench names its shapes and makes a `Problem` of each; `main` does the rest. If the error of "ours" against float64
exceeds its bound, nothing is timed. An implementation whose results at the timed shape differ from "eager" is not timed
either.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.ops.errors import OutOfMemory, unless_out_of_memory
from alignprop_fast.runtime import PeakMeter
from benchmarks.ops.correctness import errors, gradients_of, wrong_at_size
from benchmarks.ops.problem import Make, Problem, Shape
from benchmarks.ops.turns import alternate, denominators, quantiles
from benchmarks.provenance import commit

DIRECTIONS = ("forward", "backward")


def provenance(device: torch.device) -> dict[str, str]:
    """Device, versions and commit ("+" if the checkout has changes)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"gpu": name, "torch": torch.__version__, "triton": triton, "commit": commit()}


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
                graph.extend([outputs, gradients_of(outputs, outputs[0].dtype)])
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
