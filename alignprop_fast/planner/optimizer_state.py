"""Bytes of optimizer state from the shapes of the parameters, because a plan comes before the optimizer."""

from collections.abc import Iterable, Sequence
from math import prod

OPTIMIZERS = ("adamw", "adamw8bit", "pagedadamw8bit", "lion8bit", "ademamix8bit", "adafactor", "prodigy")

# 8-bit states (bitsandbytes, Dettmers et al. 2022) take one byte per element and one fp32 scale per block of 256. All
# tensors share one table of 256 fp32 values for each map.
_STATES_8BIT = {"adamw8bit": (2, 2), "pagedadamw8bit": (2, 2), "lion8bit": (1, 1), "ademamix8bit": (3, 2)}
_BLOCK = 256
_SMALLEST_8BIT = 4096  # bitsandbytes keeps tensors of fewer elements in fp32
_FP32 = 4


def merges(name: str) -> bool:
    """Whether this optimizer treats every element alike, so that all adapters can be one flat tensor.

    Adafactor does not, because it needs the rows and columns of a matrix.
    """
    return name != "adafactor"


def optimizer_bytes(name: str, shapes: Iterable[Sequence[int]], merged: bool = True) -> int:
    """Bytes of the state that optimizer `name` holds after a step.

    Args:
        shapes: of the trainable parameters. Their dtype does not matter, because states are fp32 or 8-bit.
        merged: the parameters are one flat tensor for the optimizer, as adapters are if `merges(name)`.

    Prodigy is counted with four states, though it keeps three for a tensor that starts as all zeros. Paged states are
    counted too, though they may be in host memory.

    Raises:
        ValueError: the name is unknown.
    """
    sizes = [tuple(shape) for shape in shapes]
    if merged and merges(name):
        sizes = [(sum(map(prod, sizes)),)]
    if name in _STATES_8BIT:
        states, maps = _STATES_8BIT[name]
        total = sum(_held_in_8bit(prod(size), states) for size in sizes)
        return total + (maps * 256 * _FP32 if any(prod(size) >= _SMALLEST_8BIT for size in sizes) else 0)
    if name == "adamw":  # two moments, and the count of steps, also a tensor
        return sum(2 * _FP32 * prod(size) + _FP32 for size in sizes)
    if name == "adafactor":
        return sum(_factored(size) for size in sizes)
    if name == "prodigy":  # two moments, the first values, and the weighted sum of gradients
        return sum(4 * _FP32 * prod(size) for size in sizes)
    raise ValueError(f"unknown optimizer {name!r}: use {', '.join(OPTIMIZERS)}")


def average_bytes(shapes: Iterable[Sequence[int]]) -> int:
    """Bytes of a moving average of parameters of these shapes, which is in fp32 whatever their dtype is."""
    return _FP32 * sum(map(prod, shapes))


def _held_in_8bit(count: int, states: int) -> int:
    return states * (count + _FP32 * -(-count // _BLOCK) if count >= _SMALLEST_8BIT else _FP32 * count)


def _factored(size: tuple[int, ...]) -> int:
    """A mean for each row and each column of a matrix, and one number more (Shazeer and Stern 2018, algorithm 4)."""
    if len(size) < 2:
        return _FP32 * prod(size) + _FP32
    count = prod(size)
    return _FP32 * (count // size[-1] + count // size[-2]) + _FP32
