"""Bytes of optimizer state, from the shapes of what is trained: a plan must know them before an optimizer is built."""

from collections.abc import Iterable, Sequence
from math import prod

OPTIMIZERS = ("adamw", "adamw8bit", "pagedadamw8bit", "lion8bit", "ademamix8bit", "adafactor", "prodigy")

# States of one element each, held in one byte (bitsandbytes, Dettmers et al. 2022): with one fp32 scale for each block
# of 256, and a table of 256 fp32 values for each of the maps, shared by all tensors.
_STATES_8BIT = {"adamw8bit": (2, 2), "pagedadamw8bit": (2, 2), "lion8bit": (1, 1), "ademamix8bit": (3, 2)}
_BLOCK = 256
_SMALLEST_8BIT = 4096  # bitsandbytes keeps tensors of fewer elements in fp32
_FP32 = 4


def merges(name: str) -> bool:
    """Whether this optimizer treats every element alike, so that all adapters may be one flat tensor to it.

    Adafactor does not: it needs the rows and columns of a matrix.
    """
    return name != "adafactor"


def optimizer_bytes(name: str, shapes: Iterable[Sequence[int]], merged: bool = True) -> int:
    """Bytes of the state that optimizer `name` holds once it has made a step.

    Args:
        shapes: of the trainable parameters. Their dtype does not matter: states belong to fp32 values, or 8-bit ones.
        merged: the parameters are one flat tensor to the optimizer, as adapters are where `merges(name)`.

    Prodigy is counted with all of its four states; it keeps three for a tensor that begins as all zeros. Paged states
    are counted too, though they may lie in host memory.

    Raises:
        ValueError: unknown name.
    """
    sizes = [tuple(shape) for shape in shapes]
    if merged and merges(name):
        sizes = [(sum(map(prod, sizes)),)]
    if name in _STATES_8BIT:
        states, maps = _STATES_8BIT[name]
        total = sum(_held_in_8bit(prod(size), states) for size in sizes)
        return total + (maps * 256 * _FP32 if any(prod(size) >= _SMALLEST_8BIT for size in sizes) else 0)
    if name == "adamw":  # two moments, and a count of steps that is a tensor
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
    """A mean for each row and each column of a matrix, and one number (Shazeer and Stern 2018, algorithm 4)."""
    if len(size) < 2:
        return _FP32 * prod(size) + _FP32
    count = prod(size)
    return _FP32 * (count // size[-1] + count // size[-2]) + _FP32
