"""rounded_linear: a frozen linear layer as a product of 8-bit numbers, for results through which no gradient passes.

    y = s_x s_w (q_x q_w^T) + b        q_x = round(x / s_x), q_w = round(W / s_w)

s_x is one scale for each row of x, taken at each call; s_w is one for each output channel, taken once. They map the
row's largest value to the largest number of the type, as torchao's dynamic quantisation does. int8 products are added
in int32, so they are exact (`torch._int_mm`); fp8 products (e4m3) are added in fp32 (`torch._scaled_mm`). Adapters are
not rounded. On a GPU a shape runs in 8 bits only where that measured faster (`rounded_linear_trials`).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeGuard

import torch

from alignprop_fast.ops.backend import Launch, backend
from alignprop_fast.ops.errors import first_line
from alignprop_fast.ops.lora_linear_plain import Layer, add_adapters

Tensor = torch.Tensor

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
MULTIPLE = 16  # both sizes of a weight must be multiples of it for `_scaled_mm`; `_int_mm` needs 8
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
MAX_TRITON_WIDTH = 16384  # a row must fit the registers of one thread block (kernels.rounded_linear.MAX_WIDTH)


class RoundedWeight(NamedTuple):
    """A weight in 8 bits. values: [O, I] in a dtype of `KINDS`; scale: [O, 1] in fp32."""

    values: Tensor
    scale: Tensor


class RoundedLayer(NamedTuple):
    """A layer whose product may run in 8 bits. exact: the layer as it is, with its bias and its adapter."""

    weight: RoundedWeight
    exact: Layer


Pays = Callable[[Tensor, Sequence[RoundedLayer]], bool]


class _Rounding(threading.local):
    """Of this thread, because the backward pass of a GPU runs in a thread of its own. pays: None outside `rounding`."""

    pays: Pays | None = None


_rounding = _Rounding()


@contextmanager
def rounding(pays: Pays) -> Iterator[None]:
    """Inside, layers that have a `RoundedWeight` use it where that pays. For denoising steps without gradient.

    pays: whether these layers run faster in 8 bits on such an input [..., I].
    """
    before, _rounding.pays = _rounding.pays, pays
    try:
        yield
    finally:
        _rounding.pays = before


def is_rounding() -> bool:
    """Whether this thread is inside `rounding`."""
    return _rounding.pays is not None


def run_rounded(layers: Sequence[Layer | RoundedLayer], x: Tensor) -> TypeGuard[Sequence[RoundedLayer]]:
    """Whether these layers of x now run in 8 bits: all of them have such weights, and it pays."""
    rounded = [layer for layer in layers if isinstance(layer, RoundedLayer)]
    return len(rounded) == len(layers) and _rounding.pays is not None and _rounding.pays(x, rounded)


def exact_layers(layers: Sequence[Layer | RoundedLayer]) -> list[Layer]:
    """The layers without their 8-bit weights."""
    return [layer.exact if isinstance(layer, RoundedLayer) else layer for layer in layers]


def plain_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`round_rows` by plain PyTorch."""
    scale = (x.float().abs().amax(dim=1, keepdim=True) / LARGEST[dtype]).clamp_min(torch.finfo(torch.float32).tiny)
    values = x / scale
    return (values.round_() if dtype is torch.int8 else values).to(dtype), scale


def _launch_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from alignprop_fast.kernels import rounded_linear as kernels

    return kernels.round_rows(x, dtype)


def _fake_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(len(x), 1, dtype=torch.float32)


def _plain_sums(sums: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = sums.mul(x_scale).mul_(w_scale.T)
    return (y if bias is None else y.add_(bias)).to(dtype)


def _launch_sums(sums: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    from alignprop_fast.kernels import rounded_linear as kernels

    return kernels.scale_sums(sums, x_scale, w_scale, bias, dtype)


def _fake_sums(sums: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return sums.new_empty(sums.shape, dtype=dtype)


_triton_rows = Launch("round_rows", "rounded_linear", _launch_rows, plain_rows, _fake_rows)
_triton_sums = Launch("scale_sums", "rounded_linear", _launch_sums, _plain_sums, _fake_sums)


def round_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values [T, I], scale [T, 1] in fp32), whose product is about x [T, I]. dtype: of the values, in `KINDS`."""
    if x.is_meta:  # an estimate for a GPU counts the kernel's passes over memory
        return _triton_rows.operator(x, dtype)
    fits = backend(x, "rounded_linear") == "triton" and x.shape[1] <= MAX_TRITON_WIDTH
    return (_triton_rows if fits else plain_rows)(x, dtype)


def rounded_product(values: Tensor, scale: Tensor, weight: RoundedWeight, bias: Tensor | None, like: Tensor) -> Tensor:
    """y [T, O] in the dtype of `like`, from x [T, I] as `round_rows` gives it, in the dtype of the weight's values."""
    if values.dtype is torch.int8:
        sums = torch._int_mm(values, weight.values.T)
        launched = _triton_sums if backend(like, "rounded_linear") == "triton" else _plain_sums
        return (_triton_sums.operator if like.is_meta else launched)(sums, scale, weight.scale, bias, like.dtype)
    # GPUs write products of rows with scales of their own in bf16 only.
    narrow = None if bias is None else bias.to(torch.bfloat16)
    y = torch._scaled_mm(
        values, weight.values.T, scale, weight.scale.view(1, -1), bias=narrow, out_dtype=torch.bfloat16
    )
    return y.to(like.dtype)


def rounded_outputs(x: Tensor, layers: Sequence[RoundedLayer]) -> tuple[Tensor, ...]:
    """y [..., O] of each layer in x's dtype. x [..., I] is rounded once for all of them, and not for the adapters."""
    values, scale = round_rows(x.reshape(-1, x.shape[-1]), layers[0].weight.values.dtype)
    ys = [rounded_product(values, scale, weight, exact.bias, x).view(*x.shape[:-1], -1) for weight, exact in layers]
    for y, layer in zip(ys, layers, strict=True):
        if layer.exact.down is not None:
            add_adapters([y], x, [layer.exact])
    return tuple(ys)


def why_not(kind: str, device: torch.device) -> str | None:
    """Why products of this kind do not run on the device, in one line; None: they do. It tries a small one."""
    try:
        x = torch.linspace(-1, 1, 32 * 32, device=device).view(32, 32)
        values, scale = round_rows(x, KINDS[kind])
        y = rounded_product(values, scale, RoundedWeight(values, scale), None, x)
        dense = values.float() * scale
        if device.type != "meta" and not torch.allclose(y, dense @ dense.T, rtol=1e-2, atol=1e-2):  # bf16 rounds
            return "it gives wrong numbers"
    except Exception as error:  # libraries and drivers raise anything
        return first_line(error)
    return None
