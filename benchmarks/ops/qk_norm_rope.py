"""Norms of heads and rotary positions before attention, of one stream or of text and image, at the models' sizes."""

from __future__ import annotations

import torch

from alignprop_fast.ops.qk_norm_rope import Part, qk_norm_rope, qk_norm_rope_reference
from benchmarks.ops.harness import main
from benchmarks.ops.problem import Implementation, Problem, Shape, Work, randn

# Tokens of text (0: one stream) and of the image, heads, head dimension.
SHAPES = [
    Shape("FLUX 1024", (512, 4096, 24, 128), rows=1),
    Shape("FLUX 1024", (0, 4608, 24, 128), rows=1),
    Shape("Z-Image 1024", (0, 4608, 30, 128), rows=1),
    Shape("Qwen-Image 1024", (512, 4096, 24, 128), rows=1),
]
SMALL = [Shape("small", (text, 5, 2, 8)) for text in (0, 3)]
EPS = 1e-6


def make(
    batch: int, text: int, image: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    lengths, like = [length for length in (text, image) if length], (dtype, device)
    projections = tuple(randn(batch, length, heads * head_dim, like=like) for length in lengths for _ in range(3))
    scales = randn(head_dim, like=like), randn(head_dim, like=like)
    turns = [randn(1, length, head_dim // 2, like=(torch.float32, device)) for length in lengths]

    def parts(tensors: tuple[torch.Tensor, ...]) -> list[Part]:
        *triples, q_scale, k_scale = tensors
        qs, ks, vs = (triples[i::3] for i in range(3))
        angles = [(turn.cos(), turn.sin()) for turn in turns]
        return [Part(q, k, v, (q_scale, k_scale), pair) for q, k, v, pair in zip(qs, ks, vs, angles, strict=True)]

    implementations: dict[str, Implementation] = {
        name: lambda *tensors, fn=fn: fn(parts(tensors), head_dim, EPS)
        for name, fn in (("ours", qk_norm_rope), ("eager", qk_norm_rope_reference))
    }
    n_bytes = batch * sum(lengths) * heads * head_dim * dtype.itemsize
    forward = 6 if text else 4  # values are copied too if there are two parts
    return Problem(
        (*projections, *scales), len(projections), implementations, Work(forward * n_bytes), Work(6 * n_bytes)
    )


if __name__ == "__main__":
    main("qk_norm_rope", SHAPES, SMALL, make)
