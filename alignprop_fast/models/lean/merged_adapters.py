"""Second copies of weights with the adapters added, W + s B A, for steps without gradient.

A step then runs as many products as the base model. In 16 bits the sum is rounded once, as each product's result is
anyway. The copies are made anew once per chain, because adapters change with each optimizer step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from alignprop_fast.models.lean.adapter_copies import key_of, reading
from alignprop_fast.models.lean.attention import over_a_text
from alignprop_fast.models.lean.surgery import Copied, LeanLoraLinear
from alignprop_fast.ops.lora_linear_plain import Layer, merged_into


class MergedAdapters:
    """The merged weights of a network's LoRA layers, without projections of a text that stays the same in every step.

    Addresses stay while the adapters' setting does, so a recorded graph may read them.

    Attributes:
        size_bytes: of the copies.

    Args:
        network: with the package's layers in place (`surgery.put_ops_in`).
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self._hold_room()

    @property
    def size_bytes(self) -> int:
        return sum(copied.layer.weight.numel() * copied.layer.weight.element_size() for _, copied in self._layers)

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge the present adapters."""
        if self.key != key_of(self.network):
            self._hold_room()
        for layer, copied in self._layers:
            adapted = layer.adapted()
            assert adapted is not None  # the key says so
            merged_into(copied.layer.weight, adapted)

    def in_place(self) -> AbstractContextManager[None]:
        """Inside, the layers read the merged weights."""
        return reading(self._layers)

    def _hold_room(self) -> None:
        self.key = key_of(self.network)
        of_text = {m for attn in over_a_text(self.network) for to in (attn.to_k, attn.to_v) for m in to.modules()}
        self._layers = [
            (layer, Copied(layer._active_adapter, _room(adapted)))
            for layer in self.network.modules()
            if isinstance(layer, LeanLoraLinear) and layer not in of_text
            if (adapted := layer.adapted()) is not None
        ]


def _room(layer: Layer) -> Layer:
    """The layer with room for its merged weight, and without the adapter."""
    with torch.inference_mode(False):
        weight = torch.empty(layer.weight.shape, dtype=layer.weight.dtype, device=layer.weight.device)
    return Layer(weight, layer.bias)
