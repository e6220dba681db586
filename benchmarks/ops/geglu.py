"""geglu at the widths of diffusion transformers. FLUX has none (its blocks use gelu alone)."""

from __future__ import annotations

import torch

from alignprop_fast.ops.geglu import geglu, geglu_reference
from benchmarks.ops.harness import Implementation, Problem, Shape, Work, main, optional, randn

# Tokens and D of the projection [tokens, 2 D].
SHAPES = [
    *(Shape("SD1.5 512", (tokens, 4 * width)) for tokens, width in ((4096, 320), (1024, 640), (256, 1280))),
    *(Shape("SDXL 1024", (tokens, 4 * width)) for tokens, width in ((4096, 640), (1024, 1280))),
]
SMALL = [Shape("small", (16, 32))]


def make(batch: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    uv = randn(batch, tokens, 2 * width, like=(dtype, device))
    implementations: dict[str, Implementation] = {"ours": geglu, "eager": geglu_reference}
    if (liger := optional("liger_kernel.ops.geglu")) and device.type == "cuda":
        # Its gelu is the tanh approximation: another function, a like amount of work.
        implementations["liger (tanh)"] = lambda t: liger.LigerGELUMulFunction.apply(*reversed(t.chunk(2, dim=-1)))
    n_bytes = uv.numel() // 2 * dtype.itemsize
    return Problem((uv,), 1, implementations, Work(3 * n_bytes), Work(5 * n_bytes))


if __name__ == "__main__":
    main("geglu", SHAPES, SMALL, make)
