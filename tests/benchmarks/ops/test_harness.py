"""The bench harness: a wrong op gets no speed; every op bench runs at toy size."""

import csv
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.ops import harness
from benchmarks.ops.problem import Problem, Work

ROOT = Path(__file__).parents[3]
BENCHES = [
    *("activation", "norm_modulate", "qk_norm_rope", "group_norm_silu", "frozen_conv2d", "guided_step", "attention"),
    "lora_linear",
]
CPU = torch.device("cpu")


class LeavesRowsOut(torch.autograd.Function):
    """x^2 whose gradient misses what lies beyond the first thousand numbers."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        gradient = 2 * g * ctx.saved_tensors[0]
        gradient[1000:] = 0
        return gradient


def test_what_is_wrong_at_the_timed_shape_alone_gets_no_speed_there():
    implementations = {"ours": lambda x: x * x, "eager": lambda x: x.square(), "peer": LeavesRowsOut.apply}

    def statuses(size):
        problem = Problem((torch.randn(size),), 1, implementations, Work(1.0), Work(1.0))
        rows = harness.measure(problem, CPU, 0.0, (1.0, 1.0))
        return {(row["implementation"], row["direction"]): row["status"] for row in rows}

    assert set(statuses(900).values()) == {"ok"}
    large = statuses(2000)
    assert all(large["peer", direction].startswith("WRONG at this shape: result 1") for direction in harness.DIRECTIONS)
    assert all(status == "ok" for (name, _), status in large.items() if name != "peer")


WRONG = """
import torch
from benchmarks.ops import harness
from benchmarks.ops.problem import Problem, Shape, Work
def make(batch, n, dtype, device):
    x = torch.ones(batch, n, dtype=dtype, device=device)
    work = Work(1.0)
    return Problem((x,), 1, {"ours": lambda x: OURS, "eager": lambda x: x * 1.0}, work, work)
harness.main("wrong", [Shape("any", (5,))], [Shape("any", (5,))], make)
"""


@pytest.mark.slow("starts a process for each fault")
@pytest.mark.parametrize(
    ("ours", "fault"), [("x * 1.1", "error 0.1"), ("x.nonsense()", "AttributeError"), ("x * float('nan')", "error nan")]
)
def test_no_speed_for_a_red_kernel(tmp_path, ours, fault):
    arguments = ["--device", "cpu", "--dtype", "float32", "--small", "--no-compile", "--output", tmp_path / "out.csv"]
    result = subprocess.run(
        [sys.executable, "-c", WRONG.replace("OURS", ours), *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1, result.stderr
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert len(rows) == 2 and all(row["status"].startswith(f"WRONG: {fault}") and not row["p50_ms"] for row in rows)


@pytest.mark.parametrize("name", BENCHES)
def test_bench_runs_at_toy_size(name, monkeypatch, tmp_path):
    bench = importlib.import_module(f"benchmarks.ops.{name}")
    output = tmp_path / "out.csv"
    arguments = ["--device", "cpu", "--dtype", "float32", "--small", "--no-compile", "--seconds", "0", "--batches", "1"]
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--output", str(output)])
    with pytest.raises(SystemExit) as stop:
        harness.main(name, bench.SHAPES, bench.SMALL, bench.make)
    assert stop.value.code == 0
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert {"ours", "eager"} <= {row["implementation"] for row in rows}
    assert all(row["status"] == "ok" and float(row["p50_ms"]) > 0 and row["commit"] for row in rows)
    assert all(0 < float(row["kept_bytes"]) <= float(row["peak_bytes"]) for row in rows)
    models = {"FLUX", "Z-Image"} if name == "qk_norm_rope" else {"SD1.5", "SDXL"}  # UNets have no such norm
    assert {shape.model.split()[0] for shape in bench.SHAPES} >= models
