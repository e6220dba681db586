"""Copies of the learning adapters in the base model's 16 bits, made once per chain instead of at every use.

Adapters are constant during a chain. In fp32 beside a 16-bit model they would be cast at each use: 1,120 casts in one
evaluation of SDXL, and as many of their gradients.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from alignprop_fast.models.lean.attention import is_plain, kept_linears
from alignprop_fast.models.lean.surgery import Copied, LeanLoraLinear
from alignprop_fast.ops.lora_linear_plain import Layer

_HALF = (torch.bfloat16, torch.float16)


class AdapterCopies:
    """The learning adapters of a network's linear layers, side by side in one buffer of the network's dtype.

    The A of layers that read the same tokens lie one after another, so that `lora_linears` multiplies by them as by one
    matrix. Addresses stay, so a recorded graph may read them.

    Attributes:
        size_bytes: of the buffer; 0 if nothing is copied: the network is in fp32, or has no such layers.

    Args:
        network: with the package's layers in place (`surgery.put_ops_in`).
    """

    def __init__(self, network: nn.Module):
        self.key = key_of(network)
        layers = [(layer, name) for layer in _in_order(network) if (name := _copied_adapter(layer)) is not None]
        downs: list[torch.Tensor] = [layer.lora_A[name].weight for layer, name in layers]
        ups: list[torch.Tensor] = [layer.lora_B[name].weight for layer, name in layers]
        self._parameters = [*downs, *ups]
        dtype = layers[0][0].base_layer.weight.dtype if layers else None
        self._copies = _side_by_side(self._parameters, dtype)
        self._copy_of = {id(p): copy for p, copy in zip(self._parameters, self._copies, strict=True)}
        self._layers = [
            (layer, Copied(layer._active_adapter, self._layer(layer, down, up, layer.scaling[name])))
            for (layer, name), down, up in zip(layers, downs, ups, strict=True)
        ]

    @property
    def size_bytes(self) -> int:
        return sum(copy.numel() * copy.element_size() for copy in self._copies)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the present values."""
        if self._copies:
            # By detached tensors: an earlier graph may hold the copies, and the values are the same unless weights
            # changed, which the chain checks itself.
            torch._foreach_copy_([copy.data for copy in self._copies], self._parameters)

    def stand_ins(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """For each parameter the tensor that the network reads inside `in_place`: its copy, or itself."""
        return [self._copy_of.get(id(parameter), parameter) for parameter in parameters]

    def in_place(self) -> AbstractContextManager[None]:
        """Inside, the layers read the copies, which receive the gradients."""
        return reading(self._layers)

    def _layer(self, layer: LeanLoraLinear, down: torch.Tensor, up: torch.Tensor, scale: float) -> Layer:
        base: Any = layer.base_layer
        return Layer(base.weight, base.bias, self._copy_of[id(down)], self._copy_of[id(up)], scale)


@contextmanager
def reading(copies: Sequence[tuple[LeanLoraLinear, Copied]]) -> Iterator[None]:
    """Inside, each layer computes with its copy, while the copy's setting is active."""
    before = [layer.copied for layer, _ in copies]
    for layer, copied in copies:
        layer.__dict__["copied"] = copied
    try:
        yield
    finally:
        for (layer, _), earlier in zip(copies, before, strict=True):
            layer.__dict__["copied"] = earlier


def key_of(network: nn.Module) -> Hashable:
    """What a set of copies depends on: while it stays, `refresh` is enough."""
    return tuple(_setting(layer) for layer in network.modules() if isinstance(layer, LeanLoraLinear))


def _setting(layer: LeanLoraLinear) -> Hashable:
    parameters = tuple((id(p), p.device, p.requires_grad) for p in layer.parameters())
    adapters = (id(layer._active_adapter), *layer.served_adapters(), *layer.scaling.values())
    return id(layer), layer.base_layer.weight.dtype, adapters, parameters


def _in_order(network: nn.Module) -> list[LeanLoraLinear]:
    """The LoRA layers, those of one attention in the order in which it projects them together."""
    modules = list(network.modules())
    projections = [linear for module in modules if is_plain(module) for linear, _ in kept_linears(module)]
    return [layer for layer in dict.fromkeys([*projections, *modules]) if isinstance(layer, LeanLoraLinear)]


def _copied_adapter(layer: LeanLoraLinear) -> str | None:
    """The adapter of a layer that has a copy: the only active one, learning on frozen 16-bit weights."""
    names = layer.served_adapters()
    if len(names) != 1 or layer.base_layer.weight.dtype not in _HALF:
        return None
    factors = (layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight)
    return names[0] if all(factor.requires_grad for factor in factors) else None


def _side_by_side(parameters: Sequence[torch.Tensor], dtype: torch.dtype | None) -> list[torch.Tensor]:
    if not parameters:
        return []
    with torch.inference_mode(False):
        flat = torch.empty(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
        pieces = flat.split([p.numel() for p in parameters])
        copies = [piece.view(p.shape).requires_grad_() for piece, p in zip(pieces, parameters, strict=True)]
    for copy in copies:
        copy.grad_dtype = None  # gradients come in 16 bits from products, in fp32 from kernels
    return copies
