"""Frozen linear weights in 8 or 4 bits: stored packed, and dequantised for each product.

Products are computed in the model's dtype with the dequantised values. So outputs and gradients equal those of a dense
model with these values, and every path works: the ops, PEFT's layers, stock PyTorch. Only one dense weight is alive at
a time. bitsandbytes' own modules would also quantise the activations (int8) and bypass the ops; diffusers' layerwise
casting to fp8 has no scales.

    fp8    e4m3, a scale for each output channel                         8 bits     error of normal weights 2.6 %
    int8   symmetric, a scale for each output channel                    8 bits                     0.4 to 0.8 %
    nf4    4-bit normal float (Dettmers et al. 2023), scales of 64       4.25 bits                            9 %
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from alignprop_fast.models.lean.attention import over_a_text
from alignprop_fast.models.lean.surgery import LeanLinear
from alignprop_fast.ops.rounded_linear import KINDS, MULTIPLE, RoundedWeight, round_rows

BASE_DTYPES = ("fp8", "int8", "nf4")

SMALLEST = 2**12  # weights in a layer that is worth packing
_NF4_BLOCK = 64
# Embeddings of time, text and size, and layers that modulate norms, are small and the model is sensitive to them. Not
# small are those of Qwen-Image (img_mod, txt_mod), a third of its weights, so they are packed. Adapters learn.
_SKIPPED = ("emb", "norm", "modulation", "mod_proj", "lora_")


class QuantizedWeight(torch.Tensor):
    """A packed weight [O, I] that behaves like the dense one: reading it gives the dequantised values.

    Autograd saves the packed form. The object is created at each access, so a change in place would be lost silently;
    it raises ValueError with the remedy instead.
    """

    @staticmethod
    def __new__(
        cls, kind: str, packed: torch.Tensor, scale: torch.Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> Any:
        # Report no storage, so that memory counters ignore this wrapper.
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device, storage_size=0)

    def __init__(
        self, kind: str, packed: torch.Tensor, scale: torch.Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        self.kind, self.packed, self.scale = kind, packed, scale

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            one = args[0]
            return QuantizedWeight(one.kind, one.packed, one.scale, one.shape, one.dtype)
        if func._schema.is_mutable:
            given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            given |= kwargs or {}
            written = [given.get(argument.name) for argument in func._schema.arguments if argument.is_write]
            if any(isinstance(value, QuantizedWeight) for value in written):
                raise _fixed()
        args, kwargs = tree_map_only(QuantizedWeight, QuantizedWeight.dequantized, (args, kwargs or {}))
        return func(*args, **kwargs)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise _fixed()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantizedWeight({self.kind}, {tuple(self.shape)}, {self.dtype})"

    def dequantized(self) -> torch.Tensor:
        """The dense weight [O, I] in its dtype."""
        if self.kind == "nf4":
            return _from_nf4(self.packed, self.scale, self.shape, self.dtype)
        return self.packed.view(KINDS[self.kind]).to(self.dtype).mul_(self.scale.to(self.dtype))


def _fixed() -> ValueError:
    return ValueError(
        "the base model is quantised, so its weights cannot be changed (fuse_lora, merge): leave the adapters as they "
        "are, or load the model without base_dtype and fuse there"
    )


class QuantizedLinear(LeanLinear):
    """`nn.Linear` whose frozen weight is stored in two buffers, `packed` and `scale`, and dequantised on demand."""

    kind: str
    dense_dtype: torch.dtype
    packed: torch.Tensor
    scale: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        shape = torch.Size((self.out_features, self.in_features))
        return QuantizedWeight(self.kind, self.packed, self.scale, shape, self.dense_dtype)


def quantize_linears(
    root: nn.Module, kind: str, device: torch.device, dtype: torch.dtype, smallest: int = SMALLEST
) -> list[str]:
    """Quantise the large linear layers below root in place, one after another on the device; returns their names.

    These are the layers of attention and feed-forward. Convolutions, norms, embeddings, adapters and layers with fewer
    than `smallest` weights stay dense. Call it after the other weights have their dtype, because a later cast would
    round the scales.

    Args:
        kind: "fp8", "int8" or "nf4".
        dtype: of the layers' arithmetic.

    Raises:
        ValueError: the kind is unknown, or nf4 is asked for without bitsandbytes.
    """
    if kind not in BASE_DTYPES:
        raise ValueError(f"base_dtype is {kind!r}: use {', '.join(BASE_DTYPES)}")
    if kind == "nf4" and find_spec("bitsandbytes") is None:
        raise ValueError('base_dtype="nf4" needs bitsandbytes: pip install bitsandbytes, or use fp8 or int8')
    found = _large_linears(root, (nn.Linear, LeanLinear), smallest)
    for module in found.values():
        _quantize(module, kind, device, dtype)
    return list(found)


def _large_linears(root: nn.Module, types: tuple[type, ...], smallest: int) -> dict[str, Any]:
    return {
        name: module
        for name, module in root.named_modules()
        if type(module) in types
        and module.in_features * module.out_features >= smallest
        and not any(word in name for word in _SKIPPED)
    }


def round_linears(blocks: Iterable[nn.Module], kind: str, smallest: int = SMALLEST) -> int:
    """Give the large frozen linear layers in these blocks a second weight in 8 bits, which `rounding` puts to use.

    The layers are those of `quantize_linears`, without projections of a text that stays the same in every step. A
    layer that is stored in these 8 bits already needs no second weight.

    kind: "fp8" or "int8". Returns the bytes of the new weights.
    """
    size_bytes = 0
    for block in blocks:
        of_text = {part for attn in over_a_text(block) for to in (attn.to_k, attn.to_v) for part in to.modules()}
        for module in _large_linears(block, (nn.Linear, LeanLinear, QuantizedLinear), smallest).values():
            if module in of_text or module.in_features % MULTIPLE or module.out_features % MULTIPLE:
                continue
            module.__class__ = QuantizedLinear if isinstance(module, QuantizedLinear) else LeanLinear
            module.rounded, new_bytes = _rounded(module, kind)
            size_bytes += new_bytes
    return size_bytes


@torch.no_grad()
def _rounded(module: nn.Linear, kind: str) -> tuple[RoundedWeight, int]:
    """The layer's weight in 8 bits, and its bytes beside the weight that the layer has."""
    if isinstance(module, QuantizedLinear) and module.kind == kind:
        return RoundedWeight(module.packed.view(KINDS[kind]), module.scale), 0
    found = RoundedWeight(*round_rows(module.weight + 0, KINDS[kind]))
    return found, sum(tensor.numel() * tensor.element_size() for tensor in found)


def is_quantized(root: nn.Module) -> bool:
    """Whether `quantize_linears` has changed a layer below root."""
    return any(isinstance(module, QuantizedLinear) for module in root.modules())


@torch.no_grad()
def _quantize(module: nn.Linear, kind: str, device: torch.device, dtype: torch.dtype) -> None:
    weight = module.weight.detach().to(device, dtype)
    packed, scale = _to_nf4(weight) if kind == "nf4" else _to_8_bits(kind, weight)
    del module.weight
    module.__class__ = QuantizedLinear
    module.kind, module.dense_dtype = kind, dtype  # type: ignore[assignment]
    module.register_buffer("packed", packed)
    module.register_buffer("scale", scale)


def _to_8_bits(kind: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = round_rows(weight, KINDS[kind])
    # fp8 is stored as bytes, because a cast of the module changes all floating-point tensors.
    return values if kind == "int8" else values.view(torch.uint8), scale


def _to_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=_NF4_BLOCK, quant_type="nf4")
    # This halves the bytes of the scales and adds an error of 0.2 % to one of 9 %.
    return packed, state.absmax.to(torch.bfloat16)


def _from_nf4(packed: torch.Tensor, scale: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(scale.float(), shape=shape, blocksize=_NF4_BLOCK, quant_type="nf4", dtype=dtype)
    return dequantize_4bit(packed, state)
