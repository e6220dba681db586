"""layer_norm with the residual addition in the same pass, at the widths of diffusion transformers."""

from __future__ import annotations

import torch

from alignprop_fast.ops.layer_norm import layer_norm, layer_norm_reference
from benchmarks.ops.harness import Implementation, Problem, Shape, Work, main, optional, randn

SHAPES = [
    *(Shape("SD1.5 512", sizes) for sizes in ((4096, 320), (1024, 640), (256, 1280))),
    *(Shape("SDXL 1024", sizes) for sizes in ((4096, 640), (1024, 1280))),
    Shape("FLUX 1024", (4608, 3072), rows=1),
]
SMALL = [Shape("small", (16, 40))]
EPS = 1e-5


def make(batch: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    like = (dtype, device)
    x, residual = (randn(batch, tokens, width, like=like) for _ in range(2))
    gamma, beta = (randn(width, like=like) for _ in range(2))

    def ours(x, residual, gamma, beta):
        return layer_norm(x, gamma, beta, EPS, residual)

    def eager(x, residual, gamma, beta):
        s = x + residual
        return layer_norm_reference(s, gamma, beta, EPS), s

    def ours_apart(x, residual, gamma, beta):
        s = x + residual
        return layer_norm(s, gamma, beta, EPS), s

    implementations: dict[str, Implementation] = {"ours": ours, "eager": eager, "ours, sum apart": ours_apart}
    if (liger := optional("liger_kernel.ops.layer_norm")) and device.type == "cuda":
        implementations["liger"] = lambda x, r, *affine: (
            liger.LigerLayerNormFunction.apply(x + r, *affine, EPS),
            x + r,
        )
    n_bytes = x.numel() * dtype.itemsize
    return Problem((x, residual, gamma, beta), 2, implementations, Work(4 * n_bytes), Work(4 * n_bytes))


if __name__ == "__main__":
    main("layer_norm", SHAPES, SMALL, make)
