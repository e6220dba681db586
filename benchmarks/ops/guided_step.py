"""guided_step and its adjoint on fp32 latents, with predictions in the bench's dtype; both appear as `forward` rows.

Sizes: branches, channels, height, width, adjoint (1) or forward (0).
"""

from __future__ import annotations

import torch

from alignprop_fast.ops.guided_step import (
    guided_step,
    guided_step_adjoint,
    guided_step_adjoint_reference,
    guided_step_reference,
)
from benchmarks.ops.harness import main
from benchmarks.ops.problem import Implementation, Problem, Shape, Work, randn

# The batch counts latents; the op itself makes or takes the pair.
SHAPES = [
    *(Shape("SD1.5 512", (2, 4, 64, 64, adjoint), rows=1) for adjoint in (0, 1)),
    *(Shape("SDXL 1024", (2, 4, 128, 128, adjoint), rows=1) for adjoint in (0, 1)),
    *(Shape("FLUX 1024", (1, 16, 128, 128, adjoint), rows=1) for adjoint in (0, 1)),
]
SMALL = [Shape("small", (2, 4, 8, 8, adjoint), rows=1) for adjoint in (0, 1)]


def make(
    batch: int,
    branches: int,
    channels: int,
    height: int,
    width: int,
    adjoint: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Problem:
    shape = (channels, height, width)
    x, z = (randn(batch, *shape, like=(torch.float32, device)) for _ in range(2))
    y = randn(branches * batch, *shape, like=(dtype, device))
    weights = (-4.0, 5.0)[-branches:]
    implementations: dict[str, Implementation]
    if adjoint:
        implementations = {
            "ours": lambda g, y: guided_step_adjoint(g, 0.9, weights, y.dtype),
            "eager": lambda g, y: guided_step_adjoint_reference(g, 0.9, weights, y.dtype),
        }
        moved_bytes = 2 * 4 * x.numel() + dtype.itemsize * y.numel()
        return Problem((x, y), 0, implementations, Work(moved_bytes))
    implementations = {
        "ours": lambda x, y, z: guided_step(x, y, z, 0.9, weights, 0.3),
        "eager": lambda x, y, z: guided_step_reference(x, y, z, 0.9, weights, 0.3),
    }
    return Problem((x, y, z), 0, implementations, Work(3 * 4 * x.numel() + dtype.itemsize * y.numel()))


if __name__ == "__main__":
    main("guided_step", SHAPES, SMALL, make)
