"""Counts the arithmetic and the memory traffic of an operator.

On meta tensors the package's ops run as plain PyTorch expressions. So memory passes that the fused kernels save are
counted, and estimates from them are too slow.
"""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from alignprop_fast.planner import Operator
from alignprop_fast.runtime.meta_results import returns_views, tensors_in

aten = torch.ops.aten
# They only change a shape or allocate; dropout in evaluation returns its input.
_FREE = {
    *(aten.dropout, aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided),
    *(aten.new_empty, aten.new_empty_strided),
}
_IN_8_BITS = (aten._int_mm, aten._scaled_mm)
_ON_TENSOR_CORES = ("bfloat16", "float16", "int8", "float8_e4m3fn")


def counted_operator(func: Any, arguments: Any, out: Any) -> Operator | None:
    """What an operator computes and moves; None if it takes no time. arguments: (args, kwargs)."""
    if func.overloadpacket in _FREE or returns_views(func):
        return None
    tensors = tensors_in(*arguments, out)
    if not tensors:
        return None
    size_bytes = sum(t.numel() * t.element_size() for t in tensors)
    # int8 products have int32 results, and fp8 products bf16 ones.
    widest = tensors[0] if func.overloadpacket in _IN_8_BITS else max(tensors, key=lambda t: t.numel())
    return Operator(_flop(func, arguments, out), size_bytes, rated_dtype(widest.dtype))


def rated_dtype(dtype: torch.dtype) -> str:
    """The dtype whose rate a data sheet gives: "float32" for all that tensor cores do not compute."""
    name = str(dtype).removeprefix("torch.")
    return name if name in _ON_TENSOR_CORES else "float32"


def _flop(func: Any, arguments: Any, out: Any) -> float:
    args, kwargs = arguments
    if func.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu:
        return 2 * _attention_product_flop(args[0], args[1])
    if func.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 5 * _attention_product_flop(args[1], args[2])
    # Inference mode does not split these into operators that the registry knows.
    if func.overloadpacket is aten.linear:
        return 2.0 * out.numel() * args[1].shape[1]
    if func.overloadpacket is aten.conv2d:
        return 2.0 * out.numel() * args[1][0].numel()
    if func.overloadpacket in (aten.matmul, aten._int_mm):
        return 2.0 * out.numel() * args[0].shape[-1]
    if func.overloadpacket is aten.scaled_dot_product_attention:
        return 2 * _attention_product_flop(args[0], args[1])
    formula = flop_registry.get(func.overloadpacket)
    return float(formula(*args, **(kwargs or {}), out_val=out)) if formula else 0.0


def _attention_product_flop(q_BHMD: torch.Tensor, k_BHND: torch.Tensor) -> float:
    """FLOP of one matrix product of attention; the forward pass has two, the backward pass five."""
    b, h, m, d = q_BHMD.shape
    return 2.0 * b * h * m * k_BHND.shape[2] * d
