"""Kept bytes and seconds of one denoising step with gradient, for each option and for the stock model.

    python -m benchmarks.step.step_options --model sdxl --device meta              # counts bytes: no weights, no GPU
    python -m benchmarks.step.step_options --model sdxl --output step_options.csv  # bytes and seconds on a GPU
    python -m benchmarks.step.step_options --model small --device cpu --dtype float32

One step is a guided pair: forward with graph, backward into latents and adapters (fp32, rank 16 on q, k, v, output).
"stock" is unchanged diffusers and PEFT with fused attention. The variants take turns; seconds are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig

from alignprop_fast.models.lean.attention import LeanAttnProcessor
from alignprop_fast.models.lean.surgery import put_ops_in, take_ops_out
from alignprop_fast.models.published import UNETS
from alignprop_fast.planner import GRADES, BlockOption
from alignprop_fast.runtime import Block, PeakMeter, apply_options, blocks_of
from benchmarks.rows import write_rows
from benchmarks.step.chain import provenance

SMALL: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (64, 128, 256),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}


def make_unet(model: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """Real architecture, random weights, adapters in fp32."""
    config = {"small": SMALL, **UNETS}[model]
    unet = UNet2DConditionModel(**config).requires_grad_(False).to(dtype)
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return unet


class Step:
    """One guided pair of evaluations with gradient, under any option."""

    def __init__(self, unet: UNet2DConditionModel, batch: int, dtype: torch.dtype):
        size, self.unet = unet.config.sample_size, unet
        self.x = torch.randn(2 * batch, 4, size, size, dtype=dtype).requires_grad_()
        self.text = torch.randn(2 * batch, 77, unet.config.cross_attention_dim, dtype=dtype)
        pooled, ids = (torch.zeros(2 * batch, width, dtype=dtype) for width in (1280, 6))
        added = unet.config.addition_embed_type == "text_time"
        self.added = {"text_embeds": pooled, "time_ids": ids} if added else None
        self.wanted = [self.x, *(p for p in unet.parameters() if p.requires_grad)]

    def blocks(self) -> list[Block]:
        kinds = {"transformers": BasicTransformerBlock, "residuals": ResnetBlock2D}
        groups = {name: [m for m in self.unet.modules() if isinstance(m, kind)] for name, kind in kinds.items()}
        return blocks_of(self.unet, groups)

    def run(self, variant: str, meter: PeakMeter | None = None) -> int:
        """Run forward and backward; returns the bytes kept in between, if there is a meter."""
        if variant == "stock":
            take_ops_out(self.unet)
            # Meta tensors and old GPUs have no fused SDPA kernel and would keep the whole matrix of scores.
            self.unet.set_attn_processor(LeanAttnProcessor())
        else:
            put_ops_in(self.unet)
        with apply_options({"*": BlockOption("keep" if variant == "stock" else variant)}, self.blocks()):
            y = self.unet(self.x, torch.tensor(500), self.text, added_cond_kwargs=self.added).sample
        kept_bytes = meter.live_bytes() if meter else 0
        torch.autograd.grad(y.sum(), self.wanted)
        return kept_bytes


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    with device:
        unet = make_unet(args.model, dtype).to(memory_format=torch.channels_last)
        step = Step(unet, args.batch_size, dtype)
        rows: list[dict[str, Any]] = []
        seconds: dict[str, list[float]] = {variant: [] for variant in ("stock", *GRADES)}
        for variant in seconds:
            with PeakMeter(device) as meter:
                kept_bytes = step.run(variant, meter)
            rows.append({"option": variant, "kept_bytes": kept_bytes, "peak_bytes": meter.peak_bytes})
        for _ in range(0 if device.type == "meta" else args.repeats):
            for variant, times in seconds.items():
                start = time.perf_counter()
                step.run(variant)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
    for row in rows:
        times = seconds[row["option"]]
        row["median_seconds"] = round(statistics.median(times), 4) if times else ""
        ratios = [one / two for one, two in zip(times, seconds["stock"], strict=True)]
        row["time_of_stock"] = round(statistics.median(ratios), 3) if times else ""
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", *UNETS), default="small")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="meta counts bytes only"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV to write")
    args = parser.parse_args()
    rows = measure(args)
    same = {**provenance(torch.device(args.device)), "model": args.model, "dtype": args.dtype, "batch": args.batch_size}
    for row in rows:
        gib = {key: f"{row[key] / 2**30:7.3f} GiB" for key in ("kept_bytes", "peak_bytes")}
        print(f"{row['option']:>10}: kept {gib['kept_bytes']}, peak {gib['peak_bytes']}", end="")
        print(f", {row['median_seconds']} s, {row['time_of_stock']} of stock" if row["median_seconds"] else "")
    if args.output:
        write_rows(args.output, [{**same, **row} for row in rows])


if __name__ == "__main__":
    main()
