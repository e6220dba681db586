"""What rounded steps without gradient change in a picture: PSNR against exact steps. Needs no GPU.

    python -m benchmarks.learning.sampling_precision

The bundled model in fp32 at 64 x 64 pixels, with adapters of rank 4 that are not zero: 20 steps of which the last two
carry gradient, guidance 2, eta 1, the same noise for each way. Ways: `--sampling-precision`, and for comparison a model
that is in bf16 altogether, with exact steps. The CSV has a row for each way and prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.demo import model_path
from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.models.load.pipeline import load_pipeline
from alignprop_fast.models.lora.adapters import add_lora
from benchmarks import RESULTS
from benchmarks.provenance import commit
from benchmarks.rows import write_rows

PROMPTS = ["a red apple", "two green pears", "a blue cube", "three dogs"]
STEPS, GRAD_STEPS = 20, (18, 19)
WAYS = {  # the precision of steps without gradient, and of the model
    "int8": ("int8", torch.float32),
    "fp8": ("fp8", torch.float32),
    "bf16": ("bf16", torch.float32),
    "model in bf16": ("exact", torch.bfloat16),
    "merged in bf16": ("merged", torch.bfloat16),
}


def pictures(precision: str, dtype: torch.dtype) -> torch.Tensor:
    """[B, 3, H, W] in [0, 1]."""
    pipe, generator = load_pipeline(model_path(), dtype), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in add_lora(pipe, 4, 4):
            parameter.normal_(std=0.05, generator=generator)
    sampler = DifferentiableSampler(pipe, STEPS, 2.0, 1.0, None, sampling_precision=precision)
    return sampler(PROMPTS, generator=torch.Generator().manual_seed(3), grad_steps=GRAD_STEPS).detach().float()


def psnr(images: torch.Tensor, exact: torch.Tensor) -> list[float]:
    """In dB, of each picture."""
    return [-10 * (a - b).square().mean().log10().item() for a, b in zip(images, exact, strict=True)]


def rows() -> list[dict[str, Any]]:
    exact, found = pictures("exact", torch.float32), []
    for way, precisions in WAYS.items():
        values = psnr(pictures(*precisions), exact)
        print(f"{way}: {min(values):.1f} to {max(values):.1f} dB", flush=True)
        found += [{"way": way, "prompt": p, "psnr": round(v, 2)} for p, v in zip(PROMPTS, values, strict=True)]
    about = {"commit": commit(), "torch": torch.__version__}
    return [about | row for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu" / "sampling_precision.csv", help="CSV file")
    write_rows(parser.parse_args().output, rows())


if __name__ == "__main__":
    main()
