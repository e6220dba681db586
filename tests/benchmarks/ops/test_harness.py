"""The bench harness: what it measures, and that a wrong op gets no speed; every op bench at toy size."""

import csv
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.ops import harness

ROOT = Path(__file__).parents[3]
BENCHES = [
    *("activation", "norm_modulate", "qk_norm_rope", "group_norm_silu", "frozen_conv2d", "guided_step", "attention"),
    "lora_linear",
]
CPU = torch.device("cpu")


def test_quantiles():
    assert harness.quantiles([float(i) for i in range(11)]) == pytest.approx((2.0, 5.0, 8.0))


def test_calls_alternate_and_one_that_fails_says_why():
    order = []

    def refuse():
        raise NotImplementedError("no such kernel\nand more")

    calls = {"a": lambda: order.append("a"), "b": refuse, "c": lambda: order.append("c")}
    times = harness.alternate(calls, CPU, 0.0)
    assert order[4:] == ["a", "c"] * 3 and len(times["a"]) == len(times["c"]) == 3
    assert times["b"] == "cannot run: NotImplementedError: no such kernel"


def test_times_follow_the_work():
    a = torch.randn(300, 300)
    times = harness.alternate({"one": lambda: a @ a, "many": lambda: [a @ a for _ in range(20)]}, CPU, 0.1)
    assert harness.quantiles(times["many"])[1] > 5 * harness.quantiles(times["one"])[1]


class Slanted(torch.autograd.Function):
    """x^2 with a gradient that is a thousandth too large."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2.002 * g * ctx.saved_tensors[0]


@pytest.mark.parametrize(
    ("ours", "right"),
    [
        (lambda x: x * x, True),
        (lambda x: x * x + 1e-3, False),
        (Slanted.apply, False),
        (lambda x: x * x * float("nan"), False),
    ],
    ids=["right", "wrong value", "wrong gradient", "NaN"],
)
def test_errors_of_values_and_gradients(ours, right):
    problem = harness.Problem(
        (torch.randn(64),), 1, {"ours": ours, "eager": lambda x: x.square()}, harness.Work(1.0), harness.Work(1.0)
    )
    assert (harness.errors(problem)[0] <= 1) == right


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
        problem = harness.Problem((torch.randn(size),), 1, implementations, harness.Work(1.0), harness.Work(1.0))
        rows = harness.measure(problem, CPU, 0.0, (1.0, 1.0))
        return {(row["implementation"], row["direction"]): row["status"] for row in rows}

    assert set(statuses(900).values()) == {"ok"}
    large = statuses(2000)
    assert all(large["peer", direction].startswith("WRONG at this shape: result 1") for direction in harness.DIRECTIONS)
    assert all(status == "ok" for (name, _), status in large.items() if name != "peer")


WRONG = """
import torch
from benchmarks.ops import harness
def make(batch, n, dtype, device):
    x = torch.ones(batch, n, dtype=dtype, device=device)
    work = harness.Work(1.0)
    return harness.Problem((x,), 1, {"ours": lambda x: OURS, "eager": lambda x: x * 1.0}, work, work)
harness.main("wrong", [harness.Shape("any", (5,))], [harness.Shape("any", (5,))], make)
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
