"""The package's LoRA kernels on tensors of any number of dimensions."""

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch

from alignprop_fast.ops.lora_linear_plain import Gradients, Layer

Tensor = torch.Tensor
NAME = "lora_linear.triton"


@cache
def _kernels() -> ModuleType:
    """Imported at the first call: Triton may be missing."""
    from alignprop_fast.kernels import lora_linear

    return lora_linear


@cache
def _backward_kernels() -> ModuleType:
    from alignprop_fast.kernels import lora_linear_backward

    return lora_linear_backward


def run_forward(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """y [..., O] of each layer by the kernels."""
    return _kernels().lora_linear_forward(x, *zip(*layers, strict=True))[0]


def run_split_forward(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """As `run_forward`, but the large product is PyTorch's, and a kernel adds the adapter to it in place."""
    return _kernels().lora_linear_forward_split(x, *zip(*layers, strict=True))[0]


FORWARDS = {"triton": run_forward, "split": run_split_forward}


def run_backward(gs: Sequence[Tensor], x: Tensor, layers: Sequence[Layer], wants_gx: bool) -> Gradients:
    """(dx or None, dA of each layer, dB of each layer) by the kernels."""
    weights, _, downs, ups, scales = zip(*layers, strict=True)
    t = _kernels().lora_down(x, downs)
    gx, d_downs, d_ups = _backward_kernels().lora_linear_backward(gs, x, t, weights, downs, ups, scales, wants_gx)
    return None if gx is None else gx.view(x.shape), d_downs, d_ups
