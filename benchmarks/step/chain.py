"""One training step through the chain under several memory budgets: seconds and peak bytes, predicted and measured.

    python -m benchmarks.step.chain --model sd15 --output chain.csv     # real architecture, random weights, bf16, CUDA
    python -m benchmarks.step.chain --model small --device cpu --dtype float32

The reward is the mean of the image, which costs nothing, so the chain and the decoder are measured.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from alignprop_fast import DifferentiableSampler
from alignprop_fast.making.random_weights import make_folder
from alignprop_fast.models.published import UNETS, VAE
from alignprop_fast.planner import BudgetInfeasible, parse_bytes
from alignprop_fast.runtime import PeakMeter
from benchmarks.provenance import commit
from benchmarks.rows import write_rows

PROMPTS = ["red cat", "dog", "the cat and the dog", "red dog"]


def make_pipeline(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline of the named architecture with random weights and LoRA of rank 16 on the attention projections."""
    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig

    with tempfile.TemporaryDirectory() as folder:
        if model == "small":
            make_folder("sd", folder, unet_widths=(64, 128, 256), latent_size=32, vae_widths=(32, 64, 128, 128))
        elif model == "sdxl":
            make_folder("sdxl", folder, text_width=1024)
        else:
            make_folder("sd", folder, text_width=768)
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)  # called `dtype` since diffusers 0.36
    if model in UNETS:
        conditioning = {k: pipe.unet.config[k] for k in ("addition_embed_type", "addition_time_embed_dim")}
        conditioning["projection_class_embeddings_input_dim"] = pipe.unet.config.projection_class_embeddings_input_dim
        with torch.device(device):
            unet = UNet2DConditionModel(**UNETS[model] | conditioning).to(dtype)
            vae = AutoencoderKL(**VAE, scaling_factor=pipe.vae.config.scaling_factor).to(dtype)
        # Through register_modules, so that vae_scale_factor follows the new decoder.
        parts = {**pipe.components, "unet": unet, "vae": vae}
        pipe = type(pipe)(**parts, **({"requires_safety_checker": False} if model == "sd15" else {}))
    pipe.to(device)
    pipe.unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return pipe


def measure(pipe: Any, args: argparse.Namespace, budget: str | None) -> dict[str, Any]:
    """One row: the plan for this budget, its predictions, the measured peak and the median seconds of a step."""
    sampler = DifferentiableSampler(pipe, args.steps, memory_budget=budget)
    grad_steps = range(args.steps - args.grad_steps, args.steps)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(args.batch_size)]

    def step() -> None:
        sampler(prompts, grad_steps=grad_steps).mean().backward()
        pipe.unet.zero_grad()

    step()
    with PeakMeter(sampler.model.device) as meter:
        step()
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        step()
        if sampler.model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    plan = sampler.plan
    assert plan is not None
    weights = [t for module in sampler.model.modules() for t in (*module.parameters(), *module.buffers())]
    return {
        "budget": budget or "none",
        "resident": len(plan.resident_steps),
        "replayed": len(plan.replayed_steps),
        "decoder": plan.decoder.name,
        "predicted_bytes": plan.peak_bytes,
        "measured_bytes": sum(t.numel() * t.element_size() for t in weights) + meter.peak_bytes,
        "predicted_seconds": round(plan.seconds, 3),
        "median_seconds": round(statistics.median(seconds), 3),
        "spread_seconds": round(max(seconds) - min(seconds), 3),
    }


def provenance(device: torch.device) -> dict[str, str]:
    """Which machine, which versions, which commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": version("torch"), "commit": commit()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", *UNETS), default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--grad-steps", type=int, default=5, help="number of last steps that carry gradient")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--budgets", nargs="*", default=["24GiB", "48GiB", "72GiB"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="CSV to write")
    args = parser.parse_args()
    device = torch.device(args.device)
    pipe = make_pipeline(args.model, device, getattr(torch, args.dtype))
    common = {**provenance(device), "model": args.model, "dtype": args.dtype, "batch": args.batch_size}
    rows = []
    for budget in (None, *args.budgets):
        try:
            rows.append({**common, **measure(pipe, args, budget)})
        except BudgetInfeasible as error:
            print(f"{budget}: {error}")
            continue
        print(rows[-1])
        assert budget is None or rows[-1]["measured_bytes"] <= parse_bytes(budget), "the plan broke its budget"
    if args.output:
        write_rows(args.output, rows)


if __name__ == "__main__":
    main()
