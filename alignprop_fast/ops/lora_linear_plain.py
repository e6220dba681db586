"""Frozen linear layers with low-rank adapters, with PyTorch's products. `lora_linear` has the formulas."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
Gradients = tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]


class Layer(NamedTuple):
    """A frozen layer, weight [O, I] and bias [O], and its adapter, if any: down [R, I] and up [O, R] with a scale."""

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> Tensor:
    """Plain PyTorch. x: [..., I]; weight: [O, I]; bias: [O]; down: [R, I]; up: [O, R]; returns [..., O]."""
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def _merged(layer: Layer) -> Tensor:
    """W + s B A. This costs O I R multiplications once, instead of (O + I) R per token and two more passes over y."""
    weight, _, down, up, scale = layer
    assert down is not None and up is not None
    return torch.addmm(weight, up.to(weight.dtype), down.to(weight.dtype), alpha=scale)


def _merges(x: Tensor) -> bool:
    """Whether the adapter may be merged into W for a product; half precision would round it away."""
    return x.dtype in (torch.float32, torch.float64)


def forward_plain(x: Tensor, layer: Layer) -> Tensor:
    """y of one layer with PyTorch's products."""
    if layer.down is not None and _merges(x):
        return F.linear(x, _merged(layer), layer.bias)
    return add_adapter(F.linear(x, layer.weight, layer.bias), x, layer)


def add_adapter(y: Tensor, x: Tensor, layer: Layer) -> Tensor:
    """y + s (x A^T) B^T, written into y [..., O], which is contiguous; y itself for a layer without an adapter."""
    if layer.down is None or layer.up is None:
        return y
    low = F.linear(x, layer.down.to(x.dtype)).flatten(0, -2)
    return y.view(-1, y.shape[-1]).addmm_(low, layer.up.to(x.dtype).T, alpha=layer.scale).view_as(y)


def backward_plain(g: Tensor, x: Tensor | None, layer: Layer, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """(dx, dA, dB) of one layer with PyTorch's products, each only if `wanted`."""
    weight, _, down, up, scale = layer
    if down is None or up is None:
        return (g @ weight if wanted[0] else None), None, None
    dx = d_down = d_up = None
    narrow_down, narrow_up = down.to(g.dtype), up.to(g.dtype)
    g_TO = g.reshape(-1, g.shape[-1])
    if wanted[0] and _merges(g):
        dx = g @ _merged(layer)
    elif wanted[0]:
        dx = (g_TO @ weight).addmm_(g_TO @ narrow_up, narrow_down, alpha=scale).view(*g.shape[:-1], -1)
    if wanted[1] and x is not None:
        d_down = scale * ((g_TO @ narrow_up).T @ x.reshape(-1, x.shape[-1])).to(down.dtype)
    if wanted[2] and x is not None:
        d_up = scale * (g_TO.T @ (x.reshape(-1, x.shape[-1]) @ narrow_down.T)).to(up.dtype)
    return dx, d_down, d_up


def plain_outputs(x: Tensor, layers: Iterable[Layer]) -> tuple[Tensor, ...]:
    """y of each layer with PyTorch's products."""
    return tuple(forward_plain(x, layer) for layer in layers)


def plain_gradients(
    gs: Sequence[Tensor],
    x: Tensor | None,
    layers: Iterable[Layer],
    wants_gx: bool,
    learn: Sequence[tuple[bool, bool]] | None = None,
) -> Gradients:
    """(dx, dA of each layer, dB of each layer) with PyTorch's products. learn: the dA and dB to compute; None: all."""
    total: Tensor | None = None
    d_downs, d_ups = [], []
    for g, layer, (down, up) in zip(gs, layers, learn or [(True, True)] * len(gs), strict=True):
        dx, d_down, d_up = backward_plain(g, x, layer, (wants_gx, down, up))
        total = dx if total is None or dx is None else total.add_(dx)
        d_downs.append(d_down)
        d_ups.append(d_up)
    return total, d_downs, d_ups
