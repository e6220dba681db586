"""lora_linear: frozen linear layers with low-rank adapters, y = x W^T + b + s (x A^T) B^T (Hu et al. 2021, eq. 3).

Up to three layers that read the same x (q, k, v) are one op. W and b never learn. With g_p the gradient of y_p and
u_p = s_p g_p B_p:

    dx = sum_p g_p W_p + u_p A_p        dA_p = u_p^T x        dB_p = s_p g_p^T (x A_p^T)

Saves x and the weights, once, in x's dtype: the adapters are cast, never x. (PEFT casts x for adapters in fp32, and
saves the copy of each adapter.) x A^T is made again: it costs R / O of the forward pass. On a GPU the package's kernels
or cuBLAS with small products beside it, whichever was measured faster (`ops.choice`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alignprop_fast.ops import lora_linear_triton as fused
from alignprop_fast.ops.backend import attempt
from alignprop_fast.ops.kept import Kind, kept

Tensor = torch.Tensor


class Layer(NamedTuple):
    """A frozen layer, weight [O, I] and bias [O], and its adapter, down [R, I] and up [O, R] with a scale; or none."""

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
    """W + s B A: O I R multiplications once, instead of (O + I) R for every token and two more passes over y."""
    weight, _, down, up, scale = layer
    assert down is not None and up is not None
    return torch.addmm(weight, up.to(weight.dtype), down.to(weight.dtype), alpha=scale)


def _merges(x: Tensor) -> bool:
    """Whether the adapter may be merged into W on the fly: half precision would round it away."""
    return x.dtype in (torch.float32, torch.float64)


def forward_plain(x: Tensor, layer: Layer) -> Tensor:
    """y of one layer by PyTorch's own products."""
    weight, bias, down, up, scale = layer
    if down is None or up is None:
        return F.linear(x, weight, bias)
    if _merges(x):
        return F.linear(x, _merged(layer), bias)
    y = F.linear(x, weight, bias)
    low = F.linear(x, down.to(x.dtype)).flatten(0, -2)
    return y.view(-1, y.shape[-1]).addmm_(low, up.to(x.dtype).T, alpha=scale).view_as(y)


def backward_plain(g: Tensor, x: Tensor | None, layer: Layer, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """(dx, dA, dB) of one layer by PyTorch's own products, each where `wanted` asks for it."""
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


def plain_outputs(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """y of each layer by PyTorch's own products."""
    return tuple(forward_plain(x, layer) for layer in layers)


def plain_gradients(
    gs: Sequence[Tensor],
    x: Tensor | None,
    layers: Sequence[Layer],
    wants_gx: bool,
    learn: Sequence[tuple[bool, bool]] | None = None,
) -> fused.Gradients:
    """(dx, dA of each layer, dB of each layer) by PyTorch's own products; learn: which dA and dB, where not all."""
    total: Tensor | None = None
    d_downs, d_ups = [], []
    for g, layer, (down, up) in zip(gs, layers, learn or [(True, True)] * len(layers), strict=True):
        dx, d_down, d_up = backward_plain(g, x, layer, (wants_gx, down, up))
        total = dx if total is None or dx is None else total.add_(dx)
        d_downs.append(d_down)
        d_ups.append(d_up)
    return total, d_downs, d_ups


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: tuple[float, ...], keep: Kind | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        layers = _layers(tensors, scales)
        # Without a learning adapter the gradient needs the weights alone.
        learns = any(ctx.needs_input_grad[3:])
        ctx.save_for_backward(x if learns else None, *tensors)
        ctx.scales = scales

        def compute() -> tuple[Tensor, ...]:
            if fused.chosen("forward", x, layers) == "plain":
                return plain_outputs(x, layers)
            return attempt(fused.NAME, fused.run_forward, plain_outputs, x, layers)

        return kept(keep, compute)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        layers, wants = _layers(tensors, ctx.scales), ctx.needs_input_grad
        learn = [(wants[5 + 4 * p], wants[6 + 4 * p]) for p in range(len(layers))]
        if x is None or not all(map(all, learn)) or fused.chosen("backward", x, layers) == "plain":
            dx, d_downs, d_ups = plain_gradients(gs, x, layers, wants[0], learn)
        else:
            dx, d_downs, d_ups = attempt(fused.NAME, fused.run_backward, plain_gradients, gs, x, layers, wants[0])
        rest = [grad for pair in zip(d_downs, d_ups, strict=True) for grad in (None, None, *pair)]
        return dx, None, None, *rest


def _layers(tensors: Sequence[Any], scales: Sequence[float]) -> list[Layer]:
    fours = [tensors[4 * p : 4 * p + 4] for p in range(len(scales))]
    return [Layer(w, b, down, up, scale) for (w, b, down, up), scale in zip(fours, scales, strict=True)]


def lora_linears(x: Tensor, layers: Sequence[Layer], keep: Kind | None = None) -> tuple[Tensor, ...]:
    """One to three layers of the same input, differentiable in x and the adapters.

    Args:
        x: [..., I], any strides.
        layers: weights and biases frozen and in x's dtype; adapters in any floating dtype, or None for none.
        keep: the kind of result that this is to a segment that runs again (`ops.kept`).

    Returns:
        y [..., O] of each layer in x's dtype.
    """
    tensors = [tensor for layer in layers for tensor in layer[:4]]
    return _LoraLinear.apply(x, tuple(layer.scale for layer in layers), keep, *tensors)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
    keep: Kind | None = None,
) -> Tensor:
    """x weight^T + bias + scale (x down^T) up^T of one layer; see `lora_linears`."""
    return lora_linears(x, [Layer(weight, bias, down, up, scale)], keep)[0]
