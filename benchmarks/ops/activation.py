"""Activations of diffusion transformers: geglu of UNets, swiglu of Z-Image and FLUX.2, gelu_tanh of FLUX.1.

In single-stream blocks the result is written after the attention's output, beside which PyTorch needs a `cat`.
"""

from __future__ import annotations

import torch

from alignprop_fast.ops import activation
from benchmarks.ops.harness import main
from benchmarks.ops.problem import Implementation, Problem, Shape, Work, optional, randn

# (name of the op, tokens, D of the activation, E of the tensor beside it)
FUNCTIONS = ("geglu", "swiglu", "gelu_tanh")
SHAPES = [
    *(Shape("SD1.5 512", (0, tokens, 4 * width, 0)) for tokens, width in ((4096, 320), (1024, 640), (256, 1280))),
    *(Shape("SDXL 1024", (0, tokens, 4 * width, 0)) for tokens, width in ((4096, 640), (1024, 1280))),
    Shape("Z-Image 1024", (1, 4128, 10240, 0), rows=1),
    Shape("FLUX.2 klein 4B 1024, single-stream", (1, 4608, 9216, 3072), rows=1),
    Shape("FLUX.1 1024, single-stream", (2, 4608, 12288, 3072), rows=1),
]
SMALL = [Shape("small", (0, 16, 32, 0)), Shape("small", (1, 16, 32, 8)), Shape("small", (2, 16, 32, 8))]


def make(
    batch: int, function: int, tokens: int, width: int, extra: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    name, like = FUNCTIONS[function], (dtype, device)
    gated = name != "gelu_tanh"
    x = randn(batch, tokens, (1 + gated) * width, like=like)
    beside = (randn(batch, tokens, extra, like=like),) if extra else ()
    ours, reference = getattr(activation, name), getattr(activation, f"{name}_reference")
    implementations: dict[str, Implementation] = {
        "ours": lambda x, *beside: ours(x, **({"beside": beside[0]} if beside else {})),
        "eager": lambda x, *beside: reference(x, **({"beside": beside[0]} if beside else {})),
    }
    if name == "geglu" and (liger := optional("liger_kernel.ops.geglu")) and device.type == "cuda":
        # Its gelu is the tanh approximation: another function, a like amount of work.
        implementations["liger (tanh)"] = lambda t: liger.LigerGELUMulFunction.apply(*reversed(t.chunk(2, dim=-1)))
    n_bytes, extra_bytes = batch * tokens * width * dtype.itemsize, batch * tokens * extra * dtype.itemsize
    forward, backward = Work((2 + gated) * n_bytes + 2 * extra_bytes), Work((3 + 2 * gated) * n_bytes)
    return Problem((x, *beside), 1 + len(beside), implementations, forward, backward)


if __name__ == "__main__":
    main("activation", SHAPES, SMALL, make)
