"""FlashAttention 3 (Shah et al. 2024) and 4, from the packages flash_attn_3 and flash-attn-4, for `attention_backends`.

`torch.nn.attention.activate_flash_attention_impl` would put one of them in the place of flash for the whole process.
Called by their own functions they are candidates beside it, each checked and timed at a shape like all others. A GPU, a
dtype or a head that they do not serve is an error in that trial.

We had no access to a GPU with these packages: the calls follow their sources of August 2026. The check at the shape
decides whether results, layouts and logsumexp are what they should be.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch

Tensor = torch.Tensor
Tensors = tuple[torch.Tensor, ...]

FLASH3, FLASH4 = "flash_attn_interface", "flash_attn.cute.interface"


@cache
def fault(module: str) -> str | None:
    """Why the module of a package cannot be used, in one line; None if it can."""
    try:
        import_module(module)
    except Exception as error:  # compiled code that does not fit torch or the driver raises anything
        return str(error).partition("\n")[0][:120] or type(error).__name__
    return None


def flash3_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensors:
    o, lse = _module(FLASH3)._flash_attn_forward(*_rows_first(q, k, v), softmax_scale=scale)[:2]
    return o.transpose(1, 2), lse


def flash3_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensors:
    dq, dk, dv = grads = tuple(t.new_empty(t.transpose(1, 2).shape) for t in (q, k, v))
    _module(FLASH3)._flash_attn_backward(
        *(*_contiguous_rows(g), *_rows_first(q, k, v), *_contiguous_rows(o), lse.contiguous()),
        **{"dq": dq, "dk": dk, "dv": dv, "softmax_scale": scale, "deterministic": _deterministic()},
    )
    return _rows_first(*grads)


def flash4_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensors:
    o, lse = _module(FLASH4)._flash_attn_fwd(*_rows_first(q, k, v), softmax_scale=scale, return_lse=True)[:2]
    return o.transpose(1, 2), lse


def flash4_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensors:
    grads = _module(FLASH4)._flash_attn_bwd(
        *(*_rows_first(q, k, v), *_contiguous_rows(o, g), lse.contiguous()),
        **{"softmax_scale": scale, "deterministic": _deterministic()},
    )
    return _rows_first(*grads[:3])


def _module(name: str) -> Any:
    return import_module(name)


def _deterministic() -> bool:
    """As PyTorch's flash attention does, they give the same bits twice only under torch's flag."""
    return torch.are_deterministic_algorithms_enabled()


def _rows_first(*tensors: Tensor) -> Tensors:
    """[B, M, H, D] of [B, H, M, D], or back."""
    return tuple(t.transpose(1, 2) for t in tensors)


def _contiguous_rows(*tensors: Tensor) -> Tensors:
    """`_rows_first` without the strides of an expanded tensor, which bulk copies do not take."""
    return tuple(t.transpose(1, 2).contiguous() for t in tensors)
