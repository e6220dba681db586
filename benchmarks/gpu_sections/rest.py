"""Sections for the remaining time: the decoder, and each op beside its peers."""

from __future__ import annotations

import argparse
import importlib

from benchmarks.gpu_sections.lab import Lab
from benchmarks.ops import harness
from benchmarks.step import decoder_options

OPS = (
    *("attention", "lora_linear", "group_norm_silu", "norm_modulate", "qk_norm_rope", "activation", "guided_step"),
    "frozen_conv2d",
)


def decoder(lab: Lab) -> None:
    """One image of 1024 x 1024 decoded with gradient."""
    args = argparse.Namespace(
        device=str(lab.device),
        dtype=str(lab.dtype).removeprefix("torch."),
        size=16 if lab.dry else 1024,
        ways=("stock", "keep") if lab.dry else decoder_options.WAYS,
        rows=None,
        repeats=1 if lab.dry else 5,
    )
    for row in decoder_options.measure(args):
        lab.facts.write("decoder", "way", size=args.size, **row)


def ops(lab: Lab) -> None:
    """Each op at its shapes. Results go to disk at once, because the time may end."""
    for name in OPS:
        bench = importlib.import_module(f"benchmarks.ops.{name}")
        args = argparse.Namespace(
            device=str(lab.device),
            dtype=str(lab.dtype).removeprefix("torch."),
            small=lab.dry,
            batches=[1] if lab.dry else [1, 4],
            seconds=0.01 if lab.dry else 0.1,
            compile=False,
        )
        for rows in harness.run(name, bench.SMALL if lab.dry else bench.SHAPES, bench.make, args):
            for row in rows:
                lab.facts.write("ops", "op", **row)
