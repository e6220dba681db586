"""Progress of long measurements: a function that is told which share of them is done, from 0 to 1."""

from collections.abc import Callable

Told = Callable[[float], None]


def nobody(done: float) -> None:
    """Nobody is told."""


def within(told: Told, start: float, end: float) -> Told:
    """A function that is told the share of a part, which goes from `start` to `end` of the whole."""
    return lambda done: told(start + done * (end - start))
