"""The package's LoRA kernels as custom operators."""

from collections.abc import Sequence

import torch

from alignprop_fast.ops.lora_linear_plain import Gradients, Layer

Tensor = torch.Tensor
NAME = "lora_linear.triton"


def run_forward(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """y [..., O] of each layer by the kernels."""
    weights, biases, downs, ups, scales = (list(items) for items in zip(*layers, strict=True))
    ys = _forward(x.reshape(-1, x.shape[-1]), weights, biases, downs, ups, scales)
    return tuple(y.view(*x.shape[:-1], -1) for y in ys)


def run_backward(gs: Sequence[Tensor], x: Tensor, layers: Sequence[Layer], wants_gx: bool) -> Gradients:
    """(dx or None, dA of each layer, dB of each layer) by the kernels."""
    weights, _, downs, ups, scales = (list(items) for items in zip(*layers, strict=True))
    gs = [g.reshape(-1, g.shape[-1]) for g in gs]
    grads = _backward(gs, x.reshape(-1, x.shape[-1]), weights, downs, ups, scales, wants_gx)
    gx = grads.pop(0).view(x.shape) if wants_gx else None
    return gx, grads[: len(layers)], grads[len(layers) :]


@torch.library.custom_op("alignprop_fast::lora_linear_forward", mutates_args=())
def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    from alignprop_fast.kernels import lora_linear as kernels

    return kernels.lora_linear_forward(x, [*weights], [*biases], [*downs], [*ups], [*scales])[0]


@_forward.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


@torch.library.custom_op("alignprop_fast::lora_linear_backward", mutates_args=())
def _backward(
    gs: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    wants_gx: bool,
) -> list[Tensor]:
    from alignprop_fast.kernels import lora_linear, lora_linear_backward

    low = lora_linear.lora_down(x, [*downs])
    gx, d_downs, d_ups = lora_linear_backward.lora_linear_backward(
        *([*gs], x, low, [*weights], [*downs], [*ups], [*scales], wants_gx)
    )
    # The kernels write all dA into one tensor, but an operator must not return views of the same memory.
    return [*([] if gx is None else [gx]), *(d_down.clone() for d_down in d_downs), *d_ups]


@_backward.register_fake
def _(
    gs: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    wants_gx: bool,
) -> list[Tensor]:
    adapters = [torch.empty_like(tensor) for tensor in (*downs, *ups)]
    return [*([x.new_empty(x.shape)] if wants_gx else []), *adapters]
