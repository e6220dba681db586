"""Frozen linear layers with low-rank adapters, with PyTorch's products. `lora_linear` has the formulas."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from alignprop_fast.ops.backend import is_traced

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


def merged_into(weight: Tensor | None, layer: Layer) -> Tensor:
    """W + s B A, written to `weight` or new. This costs O I R multiplications once, instead of (O + I) R per token and
    two more passes over y."""
    dtype = layer.weight.dtype
    assert layer.down is not None and layer.up is not None
    return torch.addmm(layer.weight, layer.up.to(dtype), layer.down.to(dtype), alpha=layer.scale, out=weight)


def _merges(x: Tensor) -> bool:
    """Whether the adapter may be merged into W for a product; half precision would round it away."""
    return x.dtype in (torch.float32, torch.float64)


def _groups(x: Tensor, layers: Sequence[Layer]) -> list[slice]:
    """Which layers are computed together: all in half precision, if they have adapters of the same scale."""
    alike = not _merges(x) and len({layer.scale for layer in layers}) == 1
    together = alike and all(layer.down is not None for layer in layers)
    return [slice(0, len(layers))] if together else [slice(p, p + 1) for p in range(len(layers))]


def _stacked(downs: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """[A_1; A_2; ...], [sum R, I], in this dtype. A view if they lie one after another in memory, else a copy."""
    matrices = [down.to(dtype) for down in downs if down is not None]
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if not is_traced(first) and _are_neighbours(matrices):
        return first.as_strided((sum(len(m) for m in matrices), first.shape[1]), first.stride())
    return torch.cat(matrices)


def _are_neighbours(matrices: Sequence[Tensor]) -> bool:
    """Whether contiguous matrices follow each other in one storage."""
    storage, place = matrices[0].untyped_storage()._cdata, matrices[0].storage_offset()
    for matrix in matrices:
        if (
            not matrix.is_contiguous()
            or matrix.storage_offset() != place
            or matrix.untyped_storage()._cdata != storage
            or matrix.shape[1] != matrices[0].shape[1]
        ):
            return False
        place += matrix.numel()
    return True


def _side_by_side(gs: Sequence[Tensor], ups: Sequence[Tensor]) -> Tensor:
    """[g_1 B_1, g_2 B_2, ...], [T, sum R]."""
    if len(gs) == 1:
        return gs[0] @ ups[0]
    if torch.compiler.is_compiling():  # the tracer refuses a strided `out`
        return torch.cat([g @ up for g, up in zip(gs, ups, strict=True)], dim=1)
    ranks = [up.shape[1] for up in ups]
    found = gs[0].new_empty(len(gs[0]), sum(ranks))
    for g, up, columns in zip(gs, ups, found.split(ranks, dim=1), strict=True):
        torch.mm(g, up, out=columns)
    return found


def plain_outputs(x: Tensor, layers: Iterable[Layer]) -> tuple[Tensor, ...]:
    """y of each layer with PyTorch's products."""
    layers = list(layers)
    return tuple(y for group in _groups(x, layers) for y in _outputs(x, layers[group]))


def _outputs(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """As `plain_outputs`, of layers that are computed together."""
    if layers[0].down is None:
        return [F.linear(x, layers[0].weight, layers[0].bias)]
    if _merges(x):
        return [F.linear(x, merged_into(None, layers[0]), layers[0].bias)]
    ys = [F.linear(x, layer.weight, layer.bias) for layer in layers]
    add_adapters(ys, x, layers)
    return ys


def add_adapters(ys: Sequence[Tensor], x: Tensor, layers: Sequence[Layer]) -> None:
    """Add s (x A^T) B^T to each y [..., O], contiguous and in x's dtype. All layers have adapters."""
    ups = [layer.up.to(x.dtype) for layer in layers if layer.up is not None]
    low = F.linear(x, _stacked([layer.down for layer in layers], x.dtype)).flatten(0, -2)
    for y, part, up, layer in zip(ys, low.split([up.shape[1] for up in ups], dim=1), ups, layers, strict=True):
        y.view(-1, y.shape[-1]).addmm_(part, up.T, alpha=layer.scale)


def plain_gradients(
    gs: Sequence[Tensor],
    x: Tensor | None,
    layers: Iterable[Layer],
    wants_gx: bool,
    learn: Sequence[tuple[bool, bool]] | None = None,
) -> Gradients:
    """(dx, dA of each layer, dB of each layer) with PyTorch's products. learn: the dA and dB to compute; None: all.

    dA and dB are in x's dtype, or wider.
    """
    layers = list(layers)
    learn = learn or [(True, True)] * len(layers)
    total: Tensor | None = None
    d_downs: list[Tensor | None] = []
    d_ups: list[Tensor | None] = []
    for group in _groups(gs[0], layers):
        dx, of_downs, of_ups = _gradients(gs[group], x, layers[group], wants_gx, learn[group])
        total = dx if total is None or dx is None else total.add_(dx)
        d_downs += of_downs
        d_ups += of_ups
    return total, d_downs, d_ups


def _gradients(
    gs: Sequence[Tensor],
    x: Tensor | None,
    layers: Sequence[Layer],
    wants_gx: bool,
    learn: Sequence[tuple[bool, bool]],
) -> Gradients:
    """As `plain_gradients`, of layers that are computed together."""
    if layers[0].down is None:
        return gs[0] @ layers[0].weight if wants_gx else None, [None], [None]
    dtype, scale, merges = gs[0].dtype, layers[0].scale, _merges(gs[0])
    flat = [g.reshape(-1, g.shape[-1]) for g in gs]
    ups = [layer.up.to(dtype) for layer in layers if layer.up is not None]
    downs, ranks = _stacked([layer.down for layer in layers], dtype), [up.shape[1] for up in ups]
    wants_downs, wants_ups = (x is not None and any(wanted) for wanted in zip(*learn, strict=True))
    u = _side_by_side(flat, ups) if wants_downs or (wants_gx and not merges) else None
    dx: Tensor | None = None
    d_downs: Sequence[Tensor | None] = [None] * len(layers)
    d_ups: Sequence[Tensor | None] = d_downs
    if wants_gx and merges:
        dx = gs[0] @ merged_into(None, layers[0])
    elif wants_gx and u is not None:
        dx = _input_gradient(flat, u, layers, downs).view(*gs[0].shape[:-1], -1)
    if x is not None and u is not None and wants_downs:
        d_downs = _scaled(u.T @ x.reshape(-1, x.shape[-1]), scale).split(ranks)
    if x is not None and wants_ups:
        low = (x.reshape(-1, x.shape[-1]) @ downs.T).split(ranks, dim=1)
        d_ups = [_scaled(g.T @ part, scale) for g, part in zip(flat, low, strict=True)]
    return (
        dx,
        [d if wanted else None for d, (wanted, _) in zip(d_downs, learn, strict=True)],
        [d if wanted else None for d, (_, wanted) in zip(d_ups, learn, strict=True)],
    )


def _input_gradient(gs: Sequence[Tensor], u: Tensor, layers: Sequence[Layer], downs: Tensor) -> Tensor:
    """sum_p g_p W_p + s u A for u = [g_1 B_1, g_2 B_2, ...] and the stacked A, [T, I]."""
    dx = gs[0] @ layers[0].weight
    for g, layer in zip(gs[1:], layers[1:], strict=True):
        dx.addmm_(g, layer.weight)
    return dx.addmm_(u, downs, alpha=layers[0].scale)


def _scaled(gradient: Tensor, scale: float) -> Tensor:
    """The gradient times the scale, not rounded to half precision again."""
    return gradient if scale == 1 else scale * gradient.to(torch.promote_types(gradient.dtype, torch.float32))
