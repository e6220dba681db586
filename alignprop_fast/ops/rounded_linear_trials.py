"""Measures, or estimates, whether layers run faster in 8 bits."""

from collections.abc import Callable, Sequence

import torch

from alignprop_fast.ops.autotune import Candidate, fastest, remembered
from alignprop_fast.ops.backend import is_traced
from alignprop_fast.ops.lora_linear_plain import Layer
from alignprop_fast.ops.lora_linear_trials import forward
from alignprop_fast.ops.rounded_linear import RoundedLayer, rounded_outputs

Tensor = torch.Tensor
Roofline = Callable[[float, int, torch.dtype], float]  # (FLOP, bytes, dtype) -> seconds
# Rounding to fp8 changes normal weights and inputs by 2.6 % each, so their product by 4 %; a wrong product is off by
# its own size.
_LARGEST_ERROR = 0.15


def pays(x: Tensor, layers: Sequence[RoundedLayer]) -> bool:
    """Whether these layers of x [..., I] shall run in 8 bits: on a GPU, if that measured faster; elsewhere always."""
    if x.device.type != "cuda" or is_traced(x):
        return True
    sizes = [
        (weight.values.dtype, weight.values.shape, None if exact.down is None else exact.down.shape)
        for weight, exact in layers
    ]
    return remembered(("rounded_linear", x.dtype, x.shape, *sizes), _fastest, x.device, x, layers) == "rounded"


def _fastest(x: Tensor, layers: Sequence[RoundedLayer]) -> str:
    return fastest(_problem(x, layers), _candidates(x, layers), x.device)


def pays_by(roofline: Roofline, x: Tensor, layers: Sequence[RoundedLayer]) -> bool:
    """Whether these layers of x [..., I] are faster in 8 bits by an estimate: the adapters are the same either way.

    The kernels read x and write it in 8 bits once for all layers; int8 products are written in 4 bytes and read again.
    """
    rows, wide, kind = x.numel() // x.shape[-1], x.element_size(), layers[0].weight.values.dtype
    exact, rounded = 0.0, roofline(0, x.numel() * (wide + 1), x.dtype)
    for layer in layers:
        outputs, inputs = layer.weight.values.shape
        flop, y = 2.0 * rows * inputs * outputs, rows * outputs
        exact += roofline(flop, wide * (x.numel() + inputs * outputs + y), x.dtype)
        is_int8 = kind is torch.int8
        rounded += roofline(flop, x.numel() + inputs * outputs + y * (4 if is_int8 else wide), kind)
        rounded += roofline(0, y * (4 + wide), x.dtype) if is_int8 else 0.0
    return rounded < exact


def _problem(x: Tensor, layers: Sequence[RoundedLayer]) -> str:
    """The key under which `ops.autotune` remembers the times."""
    dtypes = f"{layers[0].weight.values.dtype} {x.dtype}".replace("torch.", "")
    outs = "+".join(str(layer.weight.values.shape[0]) for layer in layers)
    ranks = "+".join("0" if layer.exact.down is None else str(layer.exact.down.shape[0]) for layer in layers)
    return f"rounded_linear {dtypes} T{x.numel() // x.shape[-1]} I{x.shape[-1]} O{outs} R{ranks}"


def _candidates(x: Tensor, layers: Sequence[RoundedLayer]) -> dict[str, Candidate]:
    """The rounded ones come first, because the first is used where nothing may be timed."""
    # A separate generator, because a trial must not change the program's random numbers.
    generator = torch.Generator(x.device).manual_seed(0)
    random = torch.randn(x.shape, generator=generator, dtype=torch.float32, device=x.device).to(x.dtype)
    exact = _ExactTrial(random, [layer.exact for layer in layers])
    return {"rounded": _RoundedTrial(random, layers, exact), "exact": exact}


class _ExactTrial:
    """A candidate of `ops.autotune`: the layers as they are."""

    def __init__(self, x: Tensor, layers: Sequence[Layer]):
        self.x, self.layers = x, layers

    def run(self) -> Sequence[Tensor]:
        return forward(self.x, self.layers)(self.x, self.layers)

    def fault(self) -> str | None:
        return None


class _RoundedTrial:
    """A candidate of `ops.autotune`: the layers in 8 bits."""

    def __init__(self, x: Tensor, layers: Sequence[RoundedLayer], exact: _ExactTrial):
        self.x, self.layers, self.exact = x, layers, exact

    def run(self) -> Sequence[Tensor]:
        return rounded_outputs(self.x, self.layers)

    def fault(self) -> str | None:
        pairs = zip(self.run(), self.exact.run(), strict=True)
        error = max(((y - e).float().norm() / e.float().norm()).item() for y, e in pairs)
        return None if error <= _LARGEST_ERROR else f"errors are {error:.2g} of the result"
