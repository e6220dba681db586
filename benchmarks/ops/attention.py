"""attention beside every backend of PyTorch's SDPA and xformers: self-attention, and cross-attention to 77 text tokens.

"ours" is the implementation that the op chose for this shape and direction. "triton" is the package's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from alignprop_fast.ops.attention import attention, attention_reference
from benchmarks.ops.harness import main
from benchmarks.ops.problem import Implementation, Problem, Shape, Work, optional, randn


def _shape(model: str, heads: int, queries: int, keys: int, head_dim: int, rows: int = 2) -> Shape:
    # In float64 only the probabilities of one head fit.
    return Shape(model, (heads, queries, keys, head_dim), rows, check_sizes=(1, queries, keys, head_dim))


SHAPES = [
    *(_shape("SD1.5 512", 8, 4096, keys, 40) for keys in (4096, 77)),
    *(_shape("SD1.5 512", 8, 1024, keys, 80) for keys in (1024, 77)),
    *(_shape("SD1.5 512", 8, 256, keys, 160) for keys in (256, 77)),
    *(_shape("SDXL 1024", 10, 4096, keys, 64) for keys in (4096, 77)),
    *(_shape("SDXL 1024", 20, 1024, keys, 64) for keys in (1024, 77)),
    _shape("FLUX 1024", 24, 4608, 4608, 128, rows=1),
]
SMALL = [_shape("small", 2, 33, keys, 16) for keys in (33, 7)]
BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class _Own(torch.autograd.Function):
    """The package's own kernels, regardless of the op's choice."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from alignprop_fast.ops import attention_triton

        o, lse = attention_triton.forward(q, k, v, q.shape[-1] ** -0.5)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from alignprop_fast.ops import attention_triton

        q, k, v, o, lse = ctx.saved_tensors
        return attention_triton.backward(g, q, k, v, o, lse, q.shape[-1] ** -0.5)


def _restricted(backend: SDPBackend) -> Callable[..., torch.Tensor]:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([backend]):
            return attention_reference(q, k, v)

    return run


def make(
    batch: int, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    lengths = (queries, keys, keys)
    # In the layout of the projections: [B, N, H, D] in memory.
    q, k, v = (randn(batch, n, heads, head_dim, like=(dtype, device)).transpose(1, 2) for n in lengths)
    implementations: dict[str, Implementation] = {"ours": attention, "eager": attention_reference}
    if device.type == "cuda":
        if optional("triton"):
            implementations["triton"] = _Own.apply
        implementations |= {name: _restricted(backend) for name, backend in BACKENDS.items()}
        if xformers := optional("xformers.ops"):
            implementations["xformers"] = lambda *qkv: xformers.memory_efficient_attention(
                *(t.transpose(1, 2) for t in qkv)
            ).transpose(1, 2)
    n_bytes = (q.numel() + k.numel()) * dtype.itemsize
    flops = 4 * batch * heads * queries * keys * head_dim
    # The backward pass computes the logits again: five products instead of two.
    return Problem((q, k, v), 3, implementations, Work(2 * n_bytes, flops), Work(4 * n_bytes, 2.5 * flops))


if __name__ == "__main__":
    main("attention", SHAPES, SMALL, make)
