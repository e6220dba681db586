"""frozen_conv2d, 3 x 3 in channels_last, at the resnets of the denoisers and of the decoder."""

from __future__ import annotations

import torch

from alignprop_fast.ops.frozen_conv2d import frozen_conv2d, frozen_conv2d_reference
from benchmarks.ops.harness import main
from benchmarks.ops.problem import Implementation, Problem, Shape, Work, randn

# Channels in, channels out, height, width. FLUX has convolutions in its decoder alone.
SHAPES = [
    *(Shape("SD1.5 512", sizes) for sizes in ((320, 320, 64, 64), (640, 640, 32, 32), (1280, 1280, 16, 16))),
    *(Shape("SDXL 1024", sizes) for sizes in ((320, 320, 128, 128), (640, 640, 64, 64), (1280, 1280, 32, 32))),
    Shape("SDXL 1024 decoder", (128, 128, 1024, 1024), rows=1, check_sizes=(128, 128, 64, 64)),
    Shape("FLUX 1024 decoder", (512, 512, 256, 256), rows=1, check_sizes=(512, 512, 32, 32)),
]
SMALL = [Shape("small", (8, 16, 8, 8))]
GEOMETRY = ((1, 1), (1, 1), (1, 1), 1)


def make(
    batch: int, channels: int, out: int, height: int, width: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    like = (dtype, device)
    x = randn(batch, channels, height, width, like=like).to(memory_format=torch.channels_last)
    weight = randn(out, channels, 3, 3, like=like, scale=(9 * channels) ** -0.5).to(memory_format=torch.channels_last)
    bias = randn(out, like=like)
    implementations: dict[str, Implementation] = {
        "ours": lambda x, weight, bias: frozen_conv2d(x, weight, bias, *GEOMETRY),
        "eager": lambda x, weight, bias: frozen_conv2d_reference(x, weight, bias, *GEOMETRY),
    }
    pixels = batch * height * width
    work = Work((pixels * (channels + out) + weight.numel()) * dtype.itemsize, 2 * pixels * weight.numel())
    return Problem((x, weight, bias), 1, implementations, work, work)


if __name__ == "__main__":
    main("frozen_conv2d", SHAPES, SMALL, make)
