"""Chooses between the package's LoRA kernels and PyTorch's products."""

from collections.abc import Hashable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from alignprop_fast.kernels.lora_blocks import MAX_PROJECTIONS, MAX_RANK
from alignprop_fast.ops.autotune import Candidate, difference, fastest, remembered
from alignprop_fast.ops.backend import attempt, backend, is_traced
from alignprop_fast.ops.lora_linear_plain import plain_gradients, plain_outputs
from alignprop_fast.ops.lora_linear_triton import FORWARDS, NAME, Forward, run_backward

Tensor = torch.Tensor


def forward(x: Tensor, layers: Sequence[Any]) -> Forward:
    """What computes y of these layers of x [..., I], from both; on a GPU the fastest, measured once per shape."""
    return plain_outputs if is_traced(x) else remembered(_key("forward", x, layers), _forward, x.device, x, layers)


def _forward(x: Tensor, layers: Sequence[Any]) -> Forward:
    name = _fastest("forward", x, layers)
    if name == "plain":
        return plain_outputs
    run = FORWARDS[name](x, layers)
    return partial(attempt, NAME, run, plain_outputs)  # type: ignore[arg-type]  # mypy: attempt's arguments come later


def backward(x: Tensor, layers: Sequence[Any]) -> str:
    """ "plain" or "triton", whichever computes gradients of these layers of x [..., I]; chosen as `forward` is."""
    if is_traced(x):
        return "plain"
    return remembered(_key("backward", x, layers), _fastest, x.device, "backward", x, layers)


def _key(direction: str, x: Tensor, layers: Sequence[Any]) -> Hashable:
    key = ["lora_linear", direction, x.dtype, x.shape, x.stride()]
    for weight, bias, down, up, scale in layers:
        # With an adapter, B has the sizes that x does not have.
        key += (bias is None, scale, *((weight.shape,) if down is None else (up.shape, up.dtype, down.dtype)))
    return tuple(key)


def _fastest(direction: str, x: Tensor, layers: Sequence[Any]) -> str:
    if backend(x, "lora_linear") != "triton" or not serves(layers):
        return "plain"
    return fastest(str(problem(direction, x, layers)), _candidates(direction, x, layers), x.device)


def serves(layers: Sequence[Any]) -> bool:
    """Whether the kernels take them: one to three that all have adapters, of one dtype and of rank at most 128."""
    if len(layers) > MAX_PROJECTIONS or layers[0].down is None:
        return False
    dtype = layers[0].down.dtype
    for layer in layers:
        if layer.down is None or layer.down.shape[0] > MAX_RANK or not layer.down.dtype == layer.up.dtype == dtype:
            return False
    return True


class Problem(NamedTuple):
    """What the fastest products depend on; its text is the key under which `ops.autotune` remembers their times."""

    direction: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    tokens: int
    n_in: int
    outs: tuple[int, ...]
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        outs, ranks = ("+".join(map(str, sizes)) for sizes in (self.outs, self.ranks))
        dtypes = f"{self.dtype} {self.adapter_dtype}".replace("torch.", "")
        return f"lora_linear {self.direction} {dtypes} T{self.tokens} I{self.n_in} O{outs} R{ranks}"


def problem(direction: str, x: Tensor, layers: Sequence[Any]) -> Problem:
    outs, ranks = tuple([layer.weight.shape[0] for layer in layers]), tuple([layer.down.shape[0] for layer in layers])
    n_in = x.shape[-1]
    return Problem(direction, x.dtype, layers[0].down.dtype, x.numel() // n_in, n_in, outs, ranks)


def _candidates(direction: str, x: Tensor, layers: Sequence[Any]) -> dict[str, Candidate]:
    inputs = _Inputs(x, layers)
    kernels = FORWARDS if direction == "forward" else ["triton"]
    return {
        "plain": _PlainTrial(direction, inputs),
        **{name: _KernelTrial(name, direction, inputs) for name in kernels},
    }


class _Inputs:
    """Random tensors for layers of these shapes, made on first use.

    Adapters are random too, because those of a new model are zero and hide errors.
    """

    def __init__(self, x: Tensor, layers: Sequence[Any]):
        self._x, self._layers = x, layers
        # A separate generator, because a trial must not change the program's random numbers.
        self._generator = torch.Generator(x.device).manual_seed(0)

    @cached_property
    def x(self) -> Tensor:
        return self._random(self._x, self._x.shape)

    @cached_property
    def gs(self) -> list[Tensor]:
        return [self._random(self._x, (*self._x.shape[:-1], len(layer.weight))) for layer in self._layers]

    @cached_property
    def layers(self) -> list[Any]:
        return [
            layer._replace(down=self._random(layer.down, layer.down.shape), up=self._random(layer.up, layer.up.shape))
            for layer in self._layers
        ]

    def _random(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float32, device=like.device)
        return (x / shape[-1] ** 0.5).to(like.dtype)


class _PlainTrial:
    """A candidate of `ops.autotune`: PyTorch's products, which are also the reference."""

    def __init__(self, direction: str, inputs: _Inputs):
        self.direction, self.inputs = direction, inputs

    def run(self) -> Sequence[Tensor | None]:
        return self._results(self.inputs.x, self.inputs.gs, self.inputs.layers)

    def fault(self) -> str | None:
        return None

    def exact(self) -> Sequence[Tensor | None]:
        """The results in float64, with one layer's weights at a time."""
        layers = (layer._replace(**_in_float64(layer)) for layer in self.inputs.layers)
        return self._results(self.inputs.x.double(), [g.double() for g in self.inputs.gs], layers)

    def _results(self, x: Tensor, gs: Sequence[Tensor], layers: Iterable[Any]) -> Sequence[Tensor | None]:
        if self.direction == "forward":
            return plain_outputs(x, layers)
        dx, d_downs, d_ups = plain_gradients(gs, x, layers, True)
        return [dx, *d_downs, *d_ups]


class _KernelTrial:
    """A candidate of `ops.autotune`: the package's kernels."""

    def __init__(self, name: str, direction: str, inputs: _Inputs):
        self.name, self.direction, self.inputs = name, direction, inputs

    @cached_property
    def _forward(self) -> Forward:
        return FORWARDS[self.name](self.inputs.x, self.inputs.layers)

    def run(self) -> Sequence[Tensor | None]:
        inputs = self.inputs
        if self.direction == "forward":
            return self._forward(inputs.x, inputs.layers)
        dx, d_downs, d_ups = run_backward(inputs.gs, inputs.x, inputs.layers, True)
        return [dx, *d_downs, *d_ups]

    def fault(self) -> str | None:
        plain = _PlainTrial(self.direction, self.inputs)
        ratio = difference(self.run(), plain.run(), plain.exact())
        return None if ratio <= 1 else f"errors are {ratio:.3g} times what is allowed"


def _in_float64(layer: Any) -> dict[str, Tensor]:
    return {name: value.double() for name, value in layer._asdict().items() if isinstance(value, Tensor)}
