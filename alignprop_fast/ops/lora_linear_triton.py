"""The package's LoRA kernels as custom operators, and the choice between them and PyTorch's own products."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from alignprop_fast.ops.backend import backend, is_traced
from alignprop_fast.ops.choice import fastest

Tensor = torch.Tensor
Gradients = tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]
NAME = "lora_linear.triton"
MAX_RANK = 128
MAX_LAYERS = 3


def chosen(direction: str, x: Tensor, layers: Sequence[Any]) -> str:
    """ "plain" or "triton" for these layers of x [..., I]; on a GPU measured once per shape (`ops.choice`).

    The kernels serve one to three layers that all have adapters of one dtype and of rank 128 at most.
    """
    downs = [layer.down for layer in layers if layer.down is not None]
    serves = (
        not is_traced(x)
        and backend(x, "lora_linear") == "triton"
        and len(downs) == len(layers) <= MAX_LAYERS
        and len({tensor.dtype for layer in layers for tensor in (layer.down, layer.up)}) == 1
        and max(down.shape[0] for down in downs) <= MAX_RANK
    )
    if not serves:
        return "plain"
    return fastest(problem(direction, x, layers), lambda: _candidates(direction, x, layers), x.device)


def problem(direction: str, x: Tensor, layers: Sequence[Any]) -> str:
    """The key under which `ops.choice` remembers these shapes."""
    outs = "+".join(str(layer.weight.shape[0]) for layer in layers)
    ranks = "+".join(str(layer.down.shape[0]) for layer in layers)
    dtypes = f"{x.dtype} {layers[0].down.dtype}".replace("torch.", "")
    return f"lora_linear {direction} {dtypes} T{x.numel() // x.shape[-1]} I{x.shape[-1]} O{outs} R{ranks}"


def _candidates(direction: str, x: Tensor, layers: Sequence[Any]) -> dict[str, Callable[[], object]]:
    from alignprop_fast.ops.lora_linear import backward_plain, forward_plain

    random = torch.randn(x.shape, dtype=x.dtype, device=x.device)
    if direction == "forward":
        return {
            "plain": lambda: [forward_plain(random, layer) for layer in layers],
            "triton": lambda: run_forward(random, layers),
        }
    gs = [random.new_ones(*x.shape[:-1], layer.weight.shape[0]) for layer in layers]
    return {
        "plain": lambda: [backward_plain(g, random, layer, (True,) * 3) for g, layer in zip(gs, layers, strict=True)],
        "triton": lambda: run_backward(gs, random, layers, True),
    }


def run_forward(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
    """y [..., O] of each layer by the kernels."""
    weights, biases, downs, ups, scales = (list(items) for items in zip(*layers, strict=True))
    ys = _forward(x.reshape(-1, x.shape[-1]), weights, biases, downs, ups, scales)
    return tuple(y.view(*x.shape[:-1], -1) for y in ys)


def run_backward(gs: Sequence[Tensor], x: Tensor, layers: Sequence[Any], wants_gx: bool) -> Gradients:
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
    # The kernels make all dA as one tensor, and an operator may not return views of one memory.
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
