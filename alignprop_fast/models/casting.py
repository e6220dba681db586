"""Casts a model's weights, except those that must stay in fp32."""

import torch
from diffusers import ModelMixin
from torch import nn


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Give the weights of a module the dtypes that `from_pretrained` gives them when it is asked for `dtype`.

    Classes name their parts that need fp32: norms of Krea 2, and in fp16 the last products of T5, which overflow. Only
    what a file holds is cast: Qwen3 computes the angles of its positions in fp32, whatever the dtype.
    """
    kept = _kept_in_fp32(module, dtype)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype if kept.isdisjoint(name.split(".")) else torch.float32)


def _kept_in_fp32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names of the parts that stay in fp32 in this dtype."""
    if isinstance(module, ModelMixin):
        return set(module._keep_in_fp32_modules or ())
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel) or dtype not in (torch.float16, torch.bfloat16):
        return set()
    always = set(module._keep_in_fp32_modules_strict or ())
    return always | set(module._keep_in_fp32_modules or ()) if dtype == torch.float16 else always
