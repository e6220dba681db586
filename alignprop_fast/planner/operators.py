"""Counted operators. They take the place of seconds until a GPU's data sheet gives these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol


class Operator(NamedTuple):
    """What decides how long an operator takes.

    flop: multiplications and additions. size_bytes: read and written. dtype: of its largest tensor, "bfloat16".
    """

    flop: float
    size_bytes: int
    dtype: str


class Time(Protocol):
    """Seconds, or the `Operators` that take them."""

    def __add__(self, other: Any, /) -> Any: ...

    def __sub__(self, other: Any, /) -> Any: ...

    def __mul__(self, times: int, /) -> Any: ...


class Operators:
    """Operators that run, and how many times each. In differences the times may be negative.

    Compares and adds like a vector.
    """

    __slots__ = ("times",)

    def __init__(self, operators: Iterable[Operator] | Mapping[Operator, int] = ()):
        self.times: Mapping[Operator, int] = Counter(operators)

    def __add__(self, other: Operators, /) -> Operators:
        return self._with(other, 1)

    def __sub__(self, other: Operators, /) -> Operators:
        return self._with(other, -1)

    def __mul__(self, times: int, /) -> Operators:
        return Operators({operator: times * count for operator, count in self.times.items()})

    def _with(self, other: Operators, sign: int) -> Operators:
        times = Counter(self.times)
        for operator, count in other.times.items():
            times[operator] += sign * count
        return Operators({operator: count for operator, count in times.items() if count})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operators) and self.times == other.times

    def __hash__(self) -> int:
        return hash(frozenset(self.times.items()))

    def __repr__(self) -> str:
        return f"Operators({sum(self.times.values())})"

    def seconds(self, of_one: Callable[[Operator], float]) -> float:
        """The sum of their seconds, never negative. of_one: seconds of one operator."""
        return max(sum(count * of_one(operator) for operator, count in self.times.items()), 0.0)
