"""Bytes and seconds to decode one image with gradient, for each way to keep or repeat the decoder, and for stock.

    python -m benchmarks.step.decoder_options --size 1024 --device meta                 # bytes alone; needs no GPU
    python -m benchmarks.step.decoder_options --size 1024 --output decoder_options.csv  # bytes and seconds on a GPU
    python -m benchmarks.step.decoder_options --size 256 --device cpu --dtype float32

The decoder of Stable Diffusion and SDXL with random weights, forward and backward into the latents. "stock" is
unchanged diffusers with fused attention. "bands" is one checkpoint of the image, with the blocks by bands of rows
inside. "stages" has a checkpoint for each stage of the decoder instead. The ways take turns; seconds are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from alignprop_fast.models.lean.attention import LeanImageAttnProcessor
from alignprop_fast.models.lean.banded_decoder import bandable, banded, banded_stages
from alignprop_fast.models.lean.surgery import put_ops_in, take_ops_out
from alignprop_fast.models.published import VAE
from alignprop_fast.planner import BlockOption
from alignprop_fast.runtime import Block, PeakMeter, apply_options, run_decoder_stage
from benchmarks.rows import write_rows
from benchmarks.step.chain import provenance

WAYS = ("stock", "keep", "block", "bands", "stages")


def make_decoder(device: torch.device, dtype: torch.dtype) -> nn.Module:
    with device:
        decoder = AutoencoderKL(**VAE).decoder.requires_grad_(False)
    return decoder.to(dtype).to(memory_format=torch.channels_last)


def decode(decoder: nn.Module, x: torch.Tensor, way: str, rows: int | None) -> torch.Tensor:
    if way == "stock":
        take_ops_out(decoder)
        # The meta device has no fused SDPA kernel and would keep the whole matrix of scores.
        for module in decoder.modules():
            if isinstance(module, Attention):
                module.set_processor(LeanImageAttnProcessor())
        return decoder(x)
    put_ops_in(decoder)
    blocks, attentions = (
        [Block(name, module, "decoder") for name, module in decoder.named_modules() if isinstance(module, kinds)]
        for kinds in ((ResnetBlock2D, Upsample2D, Attention), Attention)
    )
    if way == "stages":
        with banded_stages(decoder, rows):
            return decoder(x)
    if way == "keep":
        return decoder(x)
    if way == "block":
        return run_decoder_stage(decoder, x, "image", {"*": BlockOption.RECOMPUTE}, blocks)

    def by_bands(image: torch.Tensor) -> torch.Tensor:
        with banded(bandable(decoder), rows), apply_options({"*": BlockOption.RECOMPUTE}, attentions):
            return decoder(image)

    return run_decoder_stage(by_bands, x, "image", {})


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    decoder = make_decoder(device, dtype)
    x = torch.randn(1, 4, args.size // 8, args.size // 8, device=device, dtype=dtype).requires_grad_()

    def run(way: str, kept: Callable[[], int] = lambda: 0) -> int:
        y = decode(decoder, x, way, args.rows)
        kept_bytes = kept()
        torch.autograd.grad(y, x, torch.ones_like(y))
        return kept_bytes

    table: list[dict[str, Any]] = []
    seconds: dict[str, list[float]] = {way: [] for way in args.ways}
    for way in seconds:
        with PeakMeter(device) as meter:
            kept_bytes = run(way, meter.live_bytes)
        table.append({"way": way, "kept_bytes": kept_bytes, "peak_bytes": meter.peak_bytes})
    for _ in range(0 if device.type == "meta" else args.repeats):
        for way, times in seconds.items():
            start = time.perf_counter()
            run(way)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    for row in table:
        times = seconds[row["way"]]
        row["median_seconds"] = round(statistics.median(times), 4) if times else ""
        ratios = [one / two for one, two in zip(times, seconds[args.ways[0]], strict=True)]
        row[f"time_of_{args.ways[0]}"] = round(statistics.median(ratios), 3) if times else ""
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="meta counts bytes only"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="times are compared with the first")
    parser.add_argument("--rows", type=int, help="height of a band (default: by the image's height)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV to write")
    args = parser.parse_args()
    table = measure(args)
    same = {**provenance(torch.device(args.device)), "size": args.size, "dtype": args.dtype, "rows": args.rows or ""}
    for row in table:
        gib = {key: f"{row[key] / 2**30:7.3f} GiB" for key in ("kept_bytes", "peak_bytes")}
        print(f"{row['way']:>8}: kept {gib['kept_bytes']}, peak {gib['peak_bytes']}", end="")
        *_, seconds, ratio = row.values()
        print(f", {seconds} s, {ratio} of {args.ways[0]}" if seconds else "")
    if args.output:
        write_rows(args.output, [{**same, **row} for row in table])


if __name__ == "__main__":
    main()
