"""Truncation rules by name: they draw the gates of a chain."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import NamedTuple

from alignprop_fast.sampling.gates import Draws, Gate, Truncation, trl_gates
from alignprop_fast.sampling.step_table import StepTable

DRTUNE_STEPS = 5
DRTUNE_STOP = 0.4
REFL_SHARE = 0.25


class Beside(NamedTuple):
    """What a training step costs beside a whole chain with `Rule.count` open steps.

    evaluations: without gradient, in the mean; negative if chains end early.
    chains: of one open step, each with its own reward.
    pictures: decoded and scored without gradient.
    """

    evaluations: float = 0.0
    chains: int = 0
    pictures: int = 0


class Rule(ABC):
    """How the gates of a chain are drawn."""

    @abstractmethod
    def draw(self, table: StepTable, draws: Draws) -> Truncation:
        """The truncation of one chain. Draws only if the rule is random, and always equally many numbers if it can."""

    @abstractmethod
    def count(self, num_steps: int) -> tuple[int, float]:
        """The largest and the mean number of open steps. Renoisings are not counted: each is a chain of its own."""

    def beside(self, num_steps: int) -> Beside:
        """The costs that `count` leaves out."""
        return Beside()

    def check(self, num_steps: int) -> None:  # noqa: B027  most rules fit every chain
        """Raises ValueError if the rule does not fit a chain of this length."""


class StepRule(Rule):
    """A rule that chooses steps and leaves their gates as they are."""

    @abstractmethod
    def steps(self, num_steps: int, draws: Draws) -> tuple[int, ...]:
        """The open steps, ascending."""

    def draw(self, table: StepTable, draws: Draws) -> Truncation:
        return Truncation.at(self.steps(len(table), draws))


class Full(StepRule):
    """Every step."""

    def steps(self, num_steps: int, draws: Draws) -> tuple[int, ...]:
        return tuple(range(num_steps))

    def count(self, num_steps: int) -> tuple[int, float]:
        return num_steps, float(num_steps)


class Uniform(StepRule):
    """Step i is open iff i >= r, with r ~ U{0..T} drawn for each step: about half the steps, later ones more often.

    Source: AlignProp (Prabhudesai et al. 2023), section 4.2 and its code.
    """

    def steps(self, num_steps: int, draws: Draws) -> tuple[int, ...]:
        return trl_gates(num_steps, True, 0, (0, num_steps), draws)

    def count(self, num_steps: int) -> tuple[int, float]:
        return num_steps, num_steps / 2  # step i is open with probability (i + 1) / (T + 1)


class UniformOnce(StepRule):
    """The last K steps, K ~ U{1..T} drawn once."""

    def steps(self, num_steps: int, draws: Draws) -> tuple[int, ...]:
        return tuple(range(num_steps - draws.randint(1, num_steps), num_steps))

    def count(self, num_steps: int) -> tuple[int, float]:
        return num_steps, (num_steps + 1) / 2


class Gaussian(StepRule):
    """The last K steps, K from a normal distribution of mean T / 2 and deviation T / 6, rounded and kept in 1..T."""

    def steps(self, num_steps: int, draws: Draws) -> tuple[int, ...]:
        length = round(draws.gauss(num_steps / 2, num_steps / 6))
        return tuple(range(num_steps - min(max(length, 1), num_steps), num_steps))

    def count(self, num_steps: int) -> tuple[int, float]:
        length = NormalDist(num_steps / 2, num_steps / 6)
        return num_steps, 1 + sum(1 - length.cdf(k - 0.5) for k in range(2, num_steps + 1))


@dataclass(frozen=True)
class Last(StepRule):
    """last:K: the K steps nearest the picture. Source: DRaFT-K (Clark et al. 2024)."""

    number: int

    def check(self, num_steps: int) -> None:
        check_number(f"last:{self.number}", self.number, 1, num_steps)

    def steps(self, num_steps: int, draws: Draws) -> tuple[int, ...]:
        return tuple(range(num_steps - self.number, num_steps))

    def count(self, num_steps: int) -> tuple[int, float]:
        return self.number, float(self.number)


@dataclass(frozen=True)
class Renoised(Rule):
    """lv:N, DRaFT-LV (Clark et al. 2024): last:1, and N times more the gradient of the reward at

        x0_n = (x_n - noise * eps(x_n)) / signal,   x_n = signal * stop(x0) + noise * z_n,   z_n ~ N(0, 1)

    with signal and noise of the chain's last step. The paper sums these 1 + N gradients. We take their mean, so that
    the learning rate keeps its meaning. Costs N more network evaluations and N more reward queries per picture.
    """

    number: int

    def check(self, num_steps: int) -> None:
        if self.number < 1:
            raise ValueError(f"truncation 'lv:{self.number}' noises no picture: use lv:1 or more, or last:1")

    def draw(self, table: StepTable, draws: Draws) -> Truncation:
        return Truncation.at((len(table) - 1,), renoise_steps=(len(table) - 1,) * self.number)

    def count(self, num_steps: int) -> tuple[int, float]:
        return 1, 1.0

    def beside(self, num_steps: int) -> Beside:
        return Beside(chains=self.number)


@dataclass(frozen=True)
class DRTune(Rule):
    """drtune, drtune:K: DRTune (Wu et al. 2024).

    y = network(stop(x)), so that gradients reach early steps only along the affine path and cannot explode. The chain
    ends by predicting x0 at a step drawn from its last 40 %. K (5) of the steps up to there are open, equally spaced
    from a drawn offset.
    """

    number: int | None = None

    def check(self, num_steps: int) -> None:
        if self.number is not None:
            check_number(f"drtune:{self.number}", self.number, 1, num_steps)

    def draw(self, table: StepTable, draws: Draws) -> Truncation:
        num_steps = len(table)
        last = num_steps - draws.randint(1, _last_steps(DRTUNE_STOP, num_steps))
        number = min(self._number(num_steps), last + 1)
        stride = (last + 1) // number
        first = draws.randint(0, last - (number - 1) * stride)
        steps = range(first, last + 1, stride)[:number]
        return Truncation(tuple(Gate(step, input_scale=0.0) for step in steps), last_step=last)

    def count(self, num_steps: int) -> tuple[int, float]:
        number = self._number(num_steps)
        ends = range(1, _last_steps(DRTUNE_STOP, num_steps) + 1)
        return number, fmean(min(number, num_steps - back + 1) for back in ends)

    def beside(self, num_steps: int) -> Beside:
        return Beside((1 - _last_steps(DRTUNE_STOP, num_steps)) / 2)

    def _number(self, num_steps: int) -> int:
        return min(DRTUNE_STEPS, num_steps) if self.number is None else self.number


def _last_steps(share: float, num_steps: int) -> int:
    """Of how many steps at the end of the chain a rule draws the last one to run."""
    return max(1, round(share * num_steps))


class ReFL(Rule):
    """ReFL (Xu et al. 2023): one open step, drawn from the last quarter, where the chain ends by predicting x0."""

    def draw(self, table: StepTable, draws: Draws) -> Truncation:
        step = len(table) - draws.randint(1, _last_steps(REFL_SHARE, len(table)))
        return Truncation.at((step,), last_step=step)

    def count(self, num_steps: int) -> tuple[int, float]:
        return 1, 1.0

    def beside(self, num_steps: int) -> Beside:
        return Beside((1 - _last_steps(REFL_SHARE, num_steps)) / 2)


def check_number(rule: str, number: int, least: int, num_steps: int) -> None:
    """Raises ValueError if a rule asks for fewer than `least` or more than all steps."""
    if not least <= number <= num_steps:
        raise ValueError(f"truncation {rule!r} asks for {number} of {num_steps} steps: use {least} to {num_steps}")
