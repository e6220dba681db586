"""group_norm_silu in channels_last, at the resnets of the denoisers and of the decoder."""

from __future__ import annotations

import torch

from alignprop_fast.ops.group_norm_silu import group_norm_silu, group_norm_silu_reference
from benchmarks.ops.harness import main
from benchmarks.ops.problem import Implementation, Problem, Shape, Work, randn

# Channels, height, width. The decoder takes one row per image; FLUX has group norms in its decoder alone.
SHAPES = [
    *(Shape("SD1.5 512", sizes) for sizes in ((320, 64, 64), (640, 32, 32), (1280, 16, 16), (2560, 8, 8))),
    *(Shape("SDXL 1024", sizes) for sizes in ((320, 128, 128), (640, 64, 64), (1280, 32, 32))),
    Shape("SDXL 1024 decoder", (128, 1024, 1024), rows=1, check_sizes=(128, 128, 128)),
    Shape("FLUX 1024 decoder", (512, 256, 256), rows=1, check_sizes=(512, 64, 64)),
]
SMALL = [Shape("small", (32, 8, 8))]
GROUPS, EPS = 32, 1e-5


def make(batch: int, channels: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    like = (dtype, device)
    x = randn(batch, channels, height, width, like=like).to(memory_format=torch.channels_last)
    gamma, beta = (randn(channels, like=like) for _ in range(2))

    def ours(x, gamma, beta):
        return group_norm_silu(x, GROUPS, gamma, beta, EPS)

    def eager(x, gamma, beta):
        return group_norm_silu_reference(x, GROUPS, gamma, beta, EPS)

    n_bytes = x.numel() * dtype.itemsize
    # Stock PyTorch on its own terms, where no channels_last convolution follows.
    implementations: dict[str, Implementation] = {"ours": ours, "eager": eager, "eager contiguous": eager}
    own_inputs: dict[str, tuple[torch.Tensor, ...]] = {"eager contiguous": (x.contiguous(), gamma, beta)}
    return Problem((x, gamma, beta), 1, implementations, Work(3 * n_bytes), Work(5 * n_bytes), own_inputs)


if __name__ == "__main__":
    main("group_norm_silu", SHAPES, SMALL, make)
