"""Norms of diffusion transformers, at the widths of the models, each with what is done around it in the same pass."""

from __future__ import annotations

import torch

from alignprop_fast.ops.layer_norm import layer_norm
from alignprop_fast.ops.norm_modulate import norm_modulate, norm_modulate_reference
from benchmarks.ops.harness import main
from benchmarks.ops.problem import Implementation, Problem, Shape, Work, optional, randn

# The first size is the form: 0 layer norm with weights after a residual, 1 adaLN after a gated branch, 2 RMS norm of a
# branch that is added to the tokens.
SHAPES = [
    *(Shape("SD1.5 512", (0, *sizes)) for sizes in ((4096, 320), (1024, 640), (256, 1280))),
    *(Shape("SDXL 1024", (0, *sizes)) for sizes in ((4096, 640), (1024, 1280))),
    Shape("FLUX 1024", (1, 4096, 3072), rows=1),
    Shape("Z-Image 1024", (2, 4128, 3840), rows=1),
]
SMALL = [Shape("small", (form, 16, 40)) for form in range(3)]
EPS = 1e-5


def make(batch: int, form: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    like = (dtype, device)
    x, other = (randn(batch, tokens, width, like=like) for _ in range(2))
    weight, beta = (randn(width, like=like) for _ in range(2))
    gate, scale, shift = (randn(batch, 1, width, like=like) for _ in range(3))
    n_bytes = x.numel() * dtype.itemsize
    pairs = (("ours", norm_modulate), ("eager", norm_modulate_reference))
    implementations: dict[str, Implementation]
    if form == 2:
        implementations = {
            name: lambda x, other, gate, weight, fn=fn: fn(x, gate, other, weight, EPS, one=0.0, rms=True)
            for name, fn in pairs
        }
        return Problem((x, other, gate, weight), 2, implementations, Work(3 * n_bytes), Work(3 * n_bytes))
    if form == 1:
        implementations = {
            name: lambda x, other, gate, scale, shift, fn=fn: fn(x, scale, shift, None, EPS, branch=other, gate=gate)
            for name, fn in pairs
        }
        return Problem((x, other, gate, scale, shift), 2, implementations, Work(4 * n_bytes), Work(5 * n_bytes))
    implementations = {
        "ours": lambda x, other, weight, beta: layer_norm(x, weight, beta, EPS, other),
        "eager": lambda x, other, weight, beta: norm_modulate_reference(x, None, beta, weight, EPS, branch=other),
        "ours, sum apart": lambda x, other, weight, beta: (layer_norm(s := x + other, weight, beta, EPS), s),
    }
    if (liger := optional("liger_kernel.ops.layer_norm")) and device.type == "cuda":
        implementations["liger"] = lambda x, other, *affine: (
            liger.LigerLayerNormFunction.apply(s := x + other, *affine, EPS),
            s,
        )
    return Problem((x, other, weight, beta), 2, implementations, Work(4 * n_bytes), Work(4 * n_bytes))


if __name__ == "__main__":
    main("norm_modulate", SHAPES, SMALL, make)
