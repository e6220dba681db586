"""The package's LoRA kernels on tensors of any number of dimensions."""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

import torch

from alignprop_fast.ops.lora_linear_plain import Gradients, Layer

Tensor = torch.Tensor
NAME = "lora_linear.triton"
Forward = Callable[[Tensor, Sequence[Layer]], tuple[Tensor, ...]]


@cache
def _kernels() -> ModuleType:
    """Imported at the first call: Triton may be missing."""
    from alignprop_fast.kernels import lora_linear

    return lora_linear


@cache
def _backward_kernels() -> ModuleType:
    from alignprop_fast.kernels import lora_linear_backward

    return lora_linear_backward


def prepared_forward(x: Tensor, layers: Sequence[Layer]) -> Forward:
    """What computes y [..., O] of each layer by the kernels; see `Forward` in `kernels.lora_linear`."""
    return _kernels().Forward(x, layers)


def split_forward(x: Tensor, layers: Sequence[Layer]) -> Forward:
    """As `prepared_forward`, but the large product is PyTorch's, and a kernel adds the adapter to it in place."""
    return _kernels().split_forward


FORWARDS = {"triton": prepared_forward, "split": split_forward}


def run_backward(gs: Sequence[Tensor], x: Tensor, layers: Sequence[Layer], wants_gx: bool) -> Gradients:
    """(dx or None, dA of each layer, dB of each layer) by the kernels."""
    weights, _, downs, ups, scales = zip(*layers, strict=True)
    t = _kernels().lora_down(x, downs)
    gx, d_downs, d_ups = _backward_kernels().lora_linear_backward(gs, x, t, weights, downs, ups, scales, wants_gx)
    return None if gx is None else gx.view(x.shape), d_downs, d_ups
