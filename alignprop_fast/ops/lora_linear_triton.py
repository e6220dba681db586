"""The package's LoRA kernels on tensors of any number of dimensions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from alignprop_fast.ops.lora_linear_plain import Gradients, Layer

Tensor = torch.Tensor
NAME = "lora_linear.triton"


def run_forward(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """y [..., O] of each layer by the kernels."""
    from alignprop_fast.kernels import lora_linear as kernels

    return _forward(kernels.lora_linear_forward, x, layers)


def run_split_forward(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """As `run_forward`, but the large product is PyTorch's, and a kernel adds the adapter to it in place."""
    from alignprop_fast.kernels import lora_linear as kernels

    return _forward(kernels.lora_linear_forward_split, x, layers)


def _forward(kernel: Callable[..., Any], x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    ys, _ = kernel(x.reshape(-1, x.shape[-1]), *(list(items) for items in zip(*layers, strict=True)))
    return tuple(y.view(*x.shape[:-1], -1) for y in ys)


FORWARDS = {"triton": run_forward, "split": run_split_forward}


def run_backward(gs: Sequence[Tensor], x: Tensor, layers: Sequence[Layer], wants_gx: bool) -> Gradients:
    """(dx or None, dA of each layer, dB of each layer) by the kernels."""
    from alignprop_fast.kernels import lora_linear, lora_linear_backward

    weights, _, downs, ups, scales = (list(items) for items in zip(*layers, strict=True))
    x_TI = x.reshape(-1, x.shape[-1])
    gx, d_downs, d_ups = lora_linear_backward.lora_linear_backward(
        *([g.reshape(-1, g.shape[-1]) for g in gs], x_TI, lora_linear.lora_down(x_TI, downs)),
        *(weights, downs, ups, scales, wants_gx),
    )
    return None if gx is None else gx.view(x.shape), d_downs, d_ups
