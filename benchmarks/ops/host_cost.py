"""Host time of one call of each op, beside the aten operator that it stands for. Needs no GPU.

    python -m benchmarks.ops.host_cost --output benchmarks/results/cpu/host_cost.csv

Tensors are tiny and on the CPU, and a launch of a kernel does nothing, so both sides spend their time in Python and the
dispatcher. The two take turns in one process; the ratio is the median of those of the turns, because the speed of a
busy machine changes from turn to turn. The choice between implementations is in it, Triton's own launch is not.
"forward" records autograd's graph, "both" includes the backward pass, "sampled" has gradients off.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from alignprop_fast.kernels import launch
from alignprop_fast.ops import attention_backends, autotune, backend, lora_linear_trials
from alignprop_fast.ops.activation import geglu, geglu_reference
from alignprop_fast.ops.attention import attention
from alignprop_fast.ops.group_norm_silu import group_norm_silu
from alignprop_fast.ops.guided_step import guided_step
from alignprop_fast.ops.layer_norm import layer_norm
from alignprop_fast.ops.lora_linear import lora_linear
from benchmarks.provenance import commit
from benchmarks.rows import write_rows

Run = Callable[[], torch.Tensor]


def pairs() -> Iterator[tuple[str, Run, Run, list[torch.Tensor]]]:
    """(op, this package's call, aten's, the tensors that learn)."""
    x, gamma = torch.randn(2, 4, 8, requires_grad=True), torch.ones(8)
    yield "layer_norm", lambda: layer_norm(x, gamma, gamma), lambda: F.layer_norm(x, (8,), gamma, gamma), [x]
    yield "geglu", lambda: geglu(x), lambda: geglu_reference(x), [x]
    image = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    yield (
        "group_norm_silu",
        lambda: group_norm_silu(image, 2, gamma, gamma),
        lambda: F.group_norm(image, 2, gamma, gamma),
        [image],
    )
    weight, down, up = torch.randn(8, 8), torch.randn(2, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    yield "lora_linear", lambda: lora_linear(x, weight, None, down, up), lambda: F.linear(x, down), [x, down]
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    yield "attention", lambda: attention(q, q, q), lambda: F.scaled_dot_product_attention(q, q, q), [q]
    latents = torch.randn(1, 4, 4, 4)
    y = torch.randn(2, 4, 4, 4)
    yield (
        "guided_step",
        lambda: guided_step(latents, y, None, 0.9, [-4.0, 5.0]),
        lambda: torch.add(latents, y[:1], alpha=5.0),
        [],
    )


@contextmanager
def as_on_a_known_gpu() -> Iterator[None]:
    """Inside, ops take CPU tensors for those of a GPU on which everything was measured, and start no kernel."""
    cpu = attention_backends.CPU
    with (
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(backend, "_probed", {torch.device("cpu")}),
        mock.patch.object(launch, "launch", lambda *arguments: None),
        mock.patch.object(lora_linear_trials, "_fastest", lambda *arguments: "triton"),
        mock.patch.object(attention_backends, "_fastest", lambda *arguments: cpu.name),
        mock.patch.dict(attention_backends._BACKENDS, {cpu.name: cpu}),
        mock.patch.dict(autotune._choices, clear=True),
    ):
        yield


def both(run: Run, learning: list[torch.Tensor]) -> Callable[[], Any]:
    g = torch.ones_like(run())
    return lambda: torch.autograd.grad(run(), learning, g)


def microseconds(runs: tuple[Callable[[], Any], Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Times of a call of each, which take turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, found in zip(runs, times, strict=True):
            start = time.process_time()
            for _ in range(10):
                run()
            found.append((time.process_time() - start) * 1e5)
    return times


def measure(repeats: int) -> Iterator[dict[str, Any]]:
    for op, ours, aten, learning in pairs():
        ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {"sampled": (ours, aten)}
        if learning:
            ways |= {"forward": (ours, aten), "both": (both(ours, learning), both(aten, learning))}
        for way, runs in ways.items():
            with torch.set_grad_enabled(way != "sampled"):
                mine, theirs = microseconds(runs, repeats)
            ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            medians = [round(statistics.median(found), 1) for found in (mine, theirs)]
            times = {"ours_us": medians[0], "aten_us": medians[1], "ratio": round(ratio, 2)}
            yield {"commit": commit(), "torch": torch.__version__, "op": op, "way": way, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--output", type=Path, help="CSV to write")
    args = parser.parse_args()
    torch.set_num_threads(1)  # all work in one thread, whose own time is measured
    rows = []
    with as_on_a_known_gpu():
        for row in measure(args.repeats):
            print(f"{row['op']:>16} {row['way']:>8}: {row['ours_us']} us, aten {row['aten_us']}, ratio {row['ratio']}")
            rows.append(row)
    if args.output:
        write_rows(args.output, rows)


if __name__ == "__main__":
    main()
