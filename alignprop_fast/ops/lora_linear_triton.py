"""The package's LoRA kernels on tensors of any number of dimensions."""

from collections.abc import Sequence

import torch

from alignprop_fast.ops.lora_linear_plain import Gradients, Layer

Tensor = torch.Tensor
NAME = "lora_linear.triton"


def run_forward(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """y [..., O] of each layer by the kernels."""
    from alignprop_fast.kernels import lora_linear as kernels

    weights, biases, downs, ups, scales = (list(items) for items in zip(*layers, strict=True))
    ys, _ = kernels.lora_linear_forward(x.reshape(-1, x.shape[-1]), weights, biases, downs, ups, scales)
    return tuple(y.view(*x.shape[:-1], -1) for y in ys)


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
