"""A chain as the integral of its predictions over one time: what a leap over several steps is.

With P_i = a_0 ... a_(i-1), X_i = x_i / P_i and t_i = sum_(l<i) b_l / P_(l+1), every step of a table reads

    X_(i+1) = X_i + (t_(i+1) - t_i) y_i

For flow matching t is sigma, and for DDIM with prediction of the noise it is noise / signal up to a factor: the times
of the papers on leaps. For other predictions this is what the table itself integrates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from operator import mul

from alignprop_fast.sampling.gates import Leap
from alignprop_fast.sampling.step_table import StepTable

LEAST_LENGTH = 1e-9  # of a step, as a share of the whole path: less is rounding


@dataclass(frozen=True)
class Coordinates:
    """P and t of a table.

    Raises:
        ValueError: the table has history, noise, or a step that does not depend on its latents.
    """

    table: StepTable

    def __post_init__(self) -> None:
        if self.table.history or self.table.noisy or 0.0 in self.table.a:
            raise ValueError(
                "this truncation leaps over steps, which needs a scheduler without noise and memory: use ddim with eta "
                "0, euler or flow-euler, or another truncation, such as uniform"
            )

    @cached_property
    def scales(self) -> list[float]:
        """P_0 to P_T."""
        return list(accumulate(self.table.a, mul, initial=1.0))

    @cached_property
    def times(self) -> list[float]:
        """t_0 to t_T."""
        steps = (b / scale for b, scale in zip(self.table.b, self.scales[1:], strict=True))
        return list(accumulate(steps, initial=0.0))

    @cached_property
    def lengths(self) -> list[float]:
        """t_(i+1) - t_i of every step.

        Raises:
            ValueError: one is zero, as that of DDIM's last step if its level is already that of the picture.
        """
        lengths = [after - before for before, after in pairwise(self.times)]
        least = LEAST_LENGTH * abs(self.times[-1])
        if still := [i for i, length in enumerate(lengths) if abs(length) < least]:
            raise ValueError(
                f"this truncation divides by the lengths of steps, and step {still[0]} has none: use another number of "
                "inference steps, or another truncation, such as uniform"
            )
        return lengths

    def euler_weight(self, start: int, target: int) -> float:
        """The weight of a gate at `start` whose prediction stands for all steps up to `target`."""
        return (self.times[target] - self.times[start]) / self.lengths[start]

    def integrals(self, points: Sequence[int], start: int, target: int) -> list[float]:
        """For each point the integral over [t_start, t_target] of its Lagrange polynomial through all points."""
        begin, end = self.times[start], self.times[target]
        return [_integral([self.times[p] - begin for p in points], index, end - begin) for index in range(len(points))]

    def leap(self, start: int, target: int, lengths: Sequence[tuple[int, float]]) -> Leap:
        """x_target = P_target (X_start + sum length_i y_i)."""
        scale = self.scales[target]
        factors = tuple((i, scale * length) for i, length in lengths)
        return Leap(start, target, scale / self.scales[start], factors)


def _integral(points: Sequence[float], index: int, end: float) -> float:
    """The integral from 0 to `end` of the Lagrange polynomial that is 1 at points[index] and 0 at the others."""
    coefficients, own = [1.0], points[index]  # of the powers 0, 1, ...
    for point in (*points[:index], *points[index + 1 :]):
        shifted = [0.0, *coefficients]
        coefficients = [(up - point * c) / (own - point) for up, c in zip(shifted, [*coefficients, 0.0], strict=True)]
    return sum(c * end ** (power + 1) / (power + 1) for power, c in enumerate(coefficients))
