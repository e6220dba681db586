"""Measures whether layers run faster in 8 bits."""

from collections.abc import Sequence

import torch

from alignprop_fast.ops.autotune import Candidate, fastest
from alignprop_fast.ops.backend import is_traced
from alignprop_fast.ops.lora_linear_plain import Layer, plain_outputs
from alignprop_fast.ops.lora_linear_trials import chosen
from alignprop_fast.ops.lora_linear_triton import run_forward
from alignprop_fast.ops.rounded_linear import RoundedLayer, rounded_outputs

Tensor = torch.Tensor
# Rounding to fp8 changes normal weights and inputs by 2.6 % each, so their product by 4 %; a wrong product is off by
# its own size.
_LARGEST_ERROR = 0.15


def pays(x: Tensor, layers: Sequence[RoundedLayer]) -> bool:
    """Whether these layers of x [..., I] shall run in 8 bits: on a GPU, if that measured faster; elsewhere always."""
    if x.device.type != "cuda" or is_traced(x):
        return True
    return fastest(_problem(x, layers), lambda: _candidates(x, layers), x.device) == "rounded"


def _problem(x: Tensor, layers: Sequence[RoundedLayer]) -> str:
    """The key under which `ops.autotune` remembers these shapes."""
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
        if chosen("forward", self.x, self.layers) == "plain":
            return plain_outputs(self.x, self.layers)
        return run_forward(self.x, self.layers)

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
