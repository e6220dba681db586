"""Gates: which gradients of a chain are computed, and with which weights. They are known before the chain runs.

With x_next = a x + b y and y = network(x), a closed step passes the gradient g of x_next only along its affine path:
dx = a g. A gate at the step adds the network's part: dtheta += weight b g dy/dtheta and
dx += input_scale weight b g dy/dx.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Draws(Protocol):
    """The source of random numbers: Python's module `random`, or a `random.Random`."""

    def randint(self, a: int, b: int, /) -> int: ...

    def gauss(self, mu: float, sigma: float, /) -> float: ...

    def random(self) -> float: ...


@dataclass(frozen=True)
class Gate:
    """An open step.

    step: its index, 0 = noisiest.
    weight: factor of the gradient of the network's output.
    input_scale: factor of the gradient that comes back through the network's input; 0: it is not computed.
    """

    step: int
    weight: float = 1.0
    input_scale: float = 1.0


@dataclass(frozen=True)
class Leap:
    """The latents of a later step predicted from those of an earlier one, to see how far a surrogate is from the chain.

        prediction = x_factor x_start + sum_i factor_i y_i

    target: index of the step whose latents are predicted; the number of steps for the chain's result.
    y_factors: pairs (i, factor_i), with i of `start` or later.
    """

    start: int
    target: int
    x_factor: float
    y_factors: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Truncation:
    """The truncation of one chain.

    gates: the open steps, ascending.
    last_step: the step at which the chain ends early with the clean latents that it predicts; None: the last step.
    renoise_steps: for each of them the picture is noised to that step's level and recovered by the step alone, with
        gradient and with its own reward.
    leaps: if there are any, the gradient of each sample is divided by the sum of their errors: mean absolute
        differences to the latents, each at least `least_error`.
    """

    gates: tuple[Gate, ...]
    last_step: int | None = None
    renoise_steps: tuple[int, ...] = ()
    leaps: tuple[Leap, ...] = ()
    least_error: float = 0.0

    @classmethod
    def at(
        cls, steps: Iterable[int], last_step: int | None = None, renoise_steps: tuple[int, ...] = ()
    ) -> "Truncation":
        """Gates with weight 1 and the whole input gradient."""
        return cls(tuple(map(Gate, sorted(set(steps)))), last_step, renoise_steps)

    @property
    def grad_steps(self) -> tuple[int, ...]:
        """Indices of the open steps."""
        return tuple(gate.step for gate in self.gates)

    @property
    def terms(self) -> int:
        """How many losses there are, whose mean counts: the chain's if it has gates, and one of each renoising."""
        return bool(self.gates) + len(self.renoise_steps)


def checked(gates: Iterable[Gate], num_steps: int) -> tuple[Gate, ...]:
    """The gates in ascending order.

    Raises:
        ValueError: a step is outside the chain or given twice, or a number is not finite.
    """
    ordered = tuple(sorted(gates, key=lambda gate: gate.step))
    for before, gate in zip((None, *ordered), ordered, strict=False):
        if gate.step not in range(num_steps):
            raise ValueError(f"gradient step {gate.step} is outside the chain: use 0 to {num_steps - 1}")
        if before is not None and before.step == gate.step:
            raise ValueError(f"two gates at step {gate.step}: give each step once")
        if not (math.isfinite(gate.weight) and math.isfinite(gate.input_scale)):
            raise ValueError(f"the gate at step {gate.step} has a number that is not finite: {gate}")
    return ordered


def trl_gates(
    num_steps: int, rand: bool, timestep: int, minmax: tuple[int, int], draws: Draws = random
) -> tuple[int, ...]:
    """Open steps from trl 0.23.1's fields. Like trl it draws `randint` once per step, in the order of the steps.

    rand: step i has gradient iff i >= r with r ~ U{minmax[0]..minmax[1]}; otherwise iff i >= timestep.

    Raises:
        ValueError: fixed truncation after the last step, so that no step has gradient.
    """
    if rand:
        return tuple(i for i in range(num_steps) if i >= draws.randint(minmax[0], minmax[1]))
    if timestep >= num_steps:
        raise ValueError(
            f"truncated_backprop_timestep={timestep} leaves no step with gradient in a chain of {num_steps}: "
            f"use at most {num_steps - 1}"
        )
    return tuple(range(max(timestep, 0), num_steps))
