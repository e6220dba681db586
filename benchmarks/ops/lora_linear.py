"""lora_linear at rank 16 with adapters in fp32, beside PEFT's layer and the frozen product without an adapter."""

from __future__ import annotations

from typing import Any

import torch

from alignprop_fast.ops.lora_linear import lora_linear
from alignprop_fast.ops.lora_linear_plain import lora_linear_reference
from benchmarks.ops.harness import main
from benchmarks.ops.problem import Implementation, Problem, Shape, Work, optional, randn

# Tokens, features in, features out.
SHAPES = [
    *(Shape("SD1.5 512", sizes) for sizes in ((4096, 320, 320), (1024, 640, 640), (256, 1280, 1280))),
    *(Shape("SDXL 1024", sizes) for sizes in ((4096, 640, 640), (1024, 1280, 1280), (77, 2048, 1280))),
    Shape("FLUX 1024", (4608, 3072, 3072), rows=1, check_sizes=(512, 3072, 3072)),
]
SMALL = [Shape("small", (16, 24, 40))]
RANK, SCALE = 16, 0.5


def _peft(weight: torch.Tensor, bias: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> Any:
    """PEFT's layer around this weight, with these adapters."""
    from peft import LoraConfig, inject_adapter_in_model

    base = torch.nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    base.weight, base.bias = (torch.nn.Parameter(t, requires_grad=False) for t in (weight, bias))
    config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=["0"])
    layer = inject_adapter_in_model(config, torch.nn.Sequential(base))[0]
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = (torch.nn.Parameter(t) for t in (down, up))
    return layer


def make(batch: int, tokens: int, inner: int, outer: int, dtype: torch.dtype, device: torch.device) -> Problem:
    like, adapters = (dtype, device), (torch.float32, device)
    x, weight = randn(batch, tokens, inner, like=like), randn(outer, inner, like=like, scale=inner**-0.5)
    bias, down = randn(outer, like=like), randn(RANK, inner, like=adapters, scale=inner**-0.5)
    up = randn(outer, RANK, like=adapters, scale=RANK**-0.5)
    implementations: dict[str, Implementation] = {
        "ours": lambda x, down, up, weight, bias: lora_linear(x, weight, bias, down, up, SCALE),
        "eager": lambda x, down, up, weight, bias: lora_linear_reference(x, weight, bias, down, up, SCALE),
        "bare product": lambda x, down, up, weight, bias: lora_linear(x, weight, bias),
    }
    own_inputs: dict[str, tuple[torch.Tensor, ...]] = {}
    if optional("peft"):
        layer = _peft(weight, bias, down, up)
        implementations["peft"] = lambda x, *_: layer(x)
        own_inputs["peft"] = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    rows = batch * tokens
    moved_bytes = (rows * (inner + outer) + weight.numel()) * dtype.itemsize
    product, low = 2 * rows * inner * outer, 2 * rows * RANK
    work = Work(moved_bytes, product + low * (inner + outer))
    # dx: g W, g B, u A; dA: u^T x; dB: x A^T, g^T (x A^T).
    back = Work(moved_bytes + rows * inner * dtype.itemsize, product + low * (3 * inner + 2 * outer))
    return Problem((x, down, up, weight, bias), 3, implementations, work, back, own_inputs)


if __name__ == "__main__":
    main("lora_linear", SHAPES, SMALL, make)
