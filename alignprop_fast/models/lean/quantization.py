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

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from alignprop_fast.models.lean.surgery import LeanLinear

BASE_DTYPES = ("fp8", "int8", "nf4")

_LARGEST_FP8 = 448.0
_NF4_BLOCK = 64
# Embeddings of time, text and size, and layers that modulate norms, are small and the model is sensitive to them.
# Adapters learn.
_SKIPPED = ("emb", "norm", "lora_")


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
        values = self.packed.view(torch.float8_e4m3fn) if self.kind == "fp8" else self.packed
        return values.to(self.dtype).mul_(self.scale.to(self.dtype))


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
    root: nn.Module, kind: str, device: torch.device, dtype: torch.dtype, smallest: int = 2**12
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
    found = [
        (name, module)
        for name, module in root.named_modules()
        if type(module) in (nn.Linear, LeanLinear)
        and module.weight.numel() >= smallest
        and not any(word in name for word in _SKIPPED)
    ]
    for _, module in found:
        _quantize(module, kind, device, dtype)
    return [name for name, _ in found]


def is_quantized(root: nn.Module) -> bool:
    """Whether `quantize_linears` has changed a layer below root."""
    return any(isinstance(module, QuantizedLinear) for module in root.modules())


@torch.no_grad()
def _quantize(module: nn.Linear, kind: str, device: torch.device, dtype: torch.dtype) -> None:
    weight = module.weight.detach().to(device, dtype)
    pack = {"fp8": _to_fp8, "int8": _to_int8, "nf4": _to_nf4}[kind]
    packed, scale = pack(weight)
    del module.weight
    module.__class__ = QuantizedLinear
    module.kind, module.dense_dtype = kind, dtype  # type: ignore[assignment]
    module.register_buffer("packed", packed)
    module.register_buffer("scale", scale)


def _scale(weight: torch.Tensor, largest: float) -> torch.Tensor:
    """Scales [O, 1] in fp32 that map the largest weight of each output channel to `largest`."""
    return (weight.float().abs().amax(dim=1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)


def _to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _scale(weight, _LARGEST_FP8)
    # Stored as bytes, because a cast of the module changes all floating-point tensors.
    return (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale


def _to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _scale(weight, 127.0)
    return (weight / scale).round_().to(torch.int8), scale


def _to_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=_NF4_BLOCK, quant_type="nf4")
    # This halves the bytes of the scales and adds an error of 0.2 % to one of 9 %.
    return packed, state.absmax.to(torch.bfloat16)


def _from_nf4(packed: torch.Tensor, scale: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(scale.float(), shape=shape, blocksize=_NF4_BLOCK, quant_type="nf4", dtype=dtype)
    return dequantize_4bit(packed, state)
