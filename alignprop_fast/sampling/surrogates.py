"""Rules whose gates have weights: they stand for more steps than they open.

h_i is the length of step i in the time that `coordinates` defines (sigma, for flow matching), and h_(i..j) the length
from step i to step j. We could read the authors' code of FlowBP (which has LeapAlign too), not the full papers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from alignprop_fast.sampling.coordinates import Coordinates
from alignprop_fast.sampling.gates import Draws, Gate, Leap, Truncation
from alignprop_fast.sampling.rules import Beside, Rule, check_number
from alignprop_fast.sampling.step_table import StepTable

LATE_BIAS = 2  # step i of T is drawn with probability in proportion to (i + 1) ** LATE_BIAS, as in FlowBP's code
SUPPORTS = 3  # points of an interpolant
OPEN_SUPPORTS = 2  # of them carry gradient
SRPO_SHARES = (0.1, 0.5)  # of the chain, counted from the noise: the steps that srpo draws, as in its code
LATER_SUPPORT = 0.25  # factor of the weight of those after the first


def check_factor(rule: str, factor: float) -> None:
    """Raises ValueError if a factor of a rule is negative or not finite."""
    if not (isfinite(factor) and factor >= 0):
        raise ValueError(f"truncation {rule!r} has the factor {factor}: use a number of at least 0")


@dataclass(frozen=True)
class SRPO(Rule):
    """srpo, srpo:N (1): SRPO's Direct-Align (Shen et al. 2025, arXiv 2509.06942).

    The chain has no gradient. N times a step is drawn evenly from `SRPO_SHARES` of the chain, the picture is noised to
    its level and recovered by the step (`StepTable.alone`), with gradient. The first step is never drawn: its input is
    pure noise, so that its gradient has nothing to do with the picture and is the largest by far. The authors take
    steps of any length, and weights that depend on the level; we take the chain's steps. Their reward is a difference:
    see `rewards.relative`.
    """

    number: int = 1

    def check(self, num_steps: int) -> None:
        if self.number < 1:
            raise ValueError(f"truncation 'srpo:{self.number}' noises no picture: use srpo:1 or more")
        if num_steps < 2:
            raise ValueError("truncation 'srpo' leaves out the first step, and this chain has no other: use last:1")

    def draw(self, table: StepTable, draws: Draws) -> Truncation:
        Coordinates(table)  # refuses schedulers with noise or memory
        first, last = (max(1, round(share * len(table))) for share in SRPO_SHARES)
        steps = tuple(draws.randint(first, last) for _ in range(self.number))
        return Truncation((), renoise_steps=steps)

    def count(self, num_steps: int) -> tuple[int, float]:
        return 1, 1.0  # the first renoising, planned as the chain's last step

    def beside(self, num_steps: int) -> Beside:
        return Beside(1.0, self.number - 1, pictures=1)  # the chain's own last step, and its picture


def check_two_leaps(rule: str, num_steps: int) -> None:
    """Raises ValueError if a chain is too short for two leaps."""
    if num_steps < 2:
        raise ValueError(f"truncation {rule!r} leaps twice, which a chain of one step cannot: use last:1")


@dataclass(frozen=True)
class Discount(Rule):
    """discount:GAMMA: every step is open, with weight GAMMA ** (number of steps after it). An estimator of ours.

    GAMMA 1 is `full`; 0 is last:1.
    """

    gamma: float

    def check(self, num_steps: int) -> None:
        check_factor(f"discount:{self.gamma:g}", self.gamma)

    def draw(self, table: StepTable, draws: Draws) -> Truncation:
        last = len(table) - 1
        return Truncation(tuple(Gate(i, self.gamma ** (last - i)) for i in range(last + 1)))

    def count(self, num_steps: int) -> tuple[int, float]:
        return num_steps, float(num_steps)


@dataclass(frozen=True)
class LeapAlign(Rule):
    """leapalign, leapalign:ALPHA (0.3): LeapAlign (RockeyCoss/LeapAlign_Code), two leaps over the chain.

    Steps k < j are drawn evenly. The first leap goes from k to j, the second from j to the end:

        gate k: weight h_(k..j) / h_k, input scale 0        gate j: weight h_(j..T) / h_j, input scale ALPHA

    The gradient of each sample is divided by max(d_j, 0.1) + max(d_0, 0.1): the mean absolute differences of the
    leaps' ends to the chain's latents.
    """

    alpha: float = 0.3
    least_error: float = 0.1

    def check(self, num_steps: int) -> None:
        check_factor(f"leapalign:{self.alpha:g}", self.alpha)
        check_two_leaps("leapalign", num_steps)

    def draw(self, table: StepTable, draws: Draws) -> Truncation:
        path, end = Coordinates(table), len(table)
        k, j = draw_pair(end, draws)
        leaps = tuple(
            path.leap(start, target, [(start, path.times[target] - path.times[start])])
            for start, target in ((k, j), (j, end))
        )
        gates = (Gate(k, path.euler_weight(k, j), 0.0), Gate(j, path.euler_weight(j, end), self.alpha))
        return Truncation(gates, leaps=leaps, least_error=self.least_error)

    def count(self, num_steps: int) -> tuple[int, float]:
        return 2, 2.0


@dataclass(frozen=True)
class Sparse(Rule):
    """flowbp-sparse:K, flowbp-sparse:K:RESCALE (0): FlowBP-Sparse (arXiv 2606.11075).

    K steps, later ones more often (`LATE_BIAS`), with input scale 0. Their weight is

        1 + RESCALE (h_(0..T) / (sum of h over the open steps) - 1)

    so that with RESCALE 1 they stand for the whole path.
    """

    number: int
    rescale: float = 0.0

    def check(self, num_steps: int) -> None:
        check_number(f"flowbp-sparse:{self.number}", self.number, 1, num_steps)
        check_factor(f"flowbp-sparse:{self.number}:{self.rescale:g}", self.rescale)

    def draw(self, table: StepTable, draws: Draws) -> Truncation:
        steps = draw_late(range(len(table)), self.number, draws)
        weight = 1.0 if self.rescale == 0 else self._weight(Coordinates(table), steps)
        return Truncation(tuple(Gate(step, weight, 0.0) for step in steps))

    def _weight(self, path: Coordinates, steps: Sequence[int]) -> float:
        whole = path.times[-1] / sum(path.lengths[step] for step in steps)
        return 1 + self.rescale * (whole - 1)

    def count(self, num_steps: int) -> tuple[int, float]:
        return self.number, float(self.number)


@dataclass(frozen=True)
class Bridge(Rule):
    """flowbp-bridge:K, flowbp-bridge:K:ALPHA (0.1): FlowBP-Bridge (arXiv 2606.11075).

    A step j is drawn as LeapAlign's. Of the K open steps as many lie before j as its place says, at least one, and j
    and the rest after it, drawn late on both sides. Only j has an input scale, ALPHA: one nested path.
    """

    number: int
    alpha: float = 0.1

    def check(self, num_steps: int) -> None:
        check_number(f"flowbp-bridge:{self.number}", self.number, 2, num_steps)
        check_factor(f"flowbp-bridge:{self.number}:{self.alpha:g}", self.alpha)

    def draw(self, table: StepTable, draws: Draws) -> Truncation:
        end = len(table)
        _, j = draw_pair(end, draws)
        # At least one on each side, and no more than a side has.
        before = min(max(round(self.number * j / end), 1, self.number - (end - j)), j, self.number - 1)
        early = draw_late(range(j), before, draws)
        late = draw_late(range(j + 1, end), self.number - before - 1, draws)
        gates = (*(Gate(step, 1.0, 0.0) for step in early), Gate(j, 1.0, self.alpha))
        return Truncation((*gates, *(Gate(step, 1.0, 0.0) for step in late)))

    def count(self, num_steps: int) -> tuple[int, float]:
        return self.number, float(self.number)


@dataclass(frozen=True)
class Lagrange(Rule):
    """flowbp-lagrange, flowbp-lagrange:ALPHA (0.1): FlowBP-Lagrange (arXiv 2606.11075).

    LeapAlign's two leaps, each with predictions at up to three of its steps, evenly spaced from its first one. Their
    weights are the integrals of their Lagrange polynomials over the leap, divided by h of the step. The first two are
    open, the second with a quarter of its weight. Only j has an input scale, ALPHA. Errors as LeapAlign's, with 0.2.
    The authors draw k and j by three gamma variables; we draw them evenly.
    """

    alpha: float = 0.1
    least_error: float = 0.2

    def check(self, num_steps: int) -> None:
        check_factor(f"flowbp-lagrange:{self.alpha:g}", self.alpha)
        check_two_leaps("flowbp-lagrange", num_steps)

    def draw(self, table: StepTable, draws: Draws) -> Truncation:
        path, end = Coordinates(table), len(table)
        k, j = draw_pair(end, draws)
        gates, leaps = [], []
        for start, target, alpha in ((k, j, 0.0), (j, end, self.alpha)):
            found, leap = self._leap(path, start, target, alpha)
            gates += found
            leaps.append(leap)
        return Truncation(tuple(gates), leaps=tuple(leaps), least_error=self.least_error)

    def _leap(self, path: Coordinates, start: int, target: int, alpha: float) -> tuple[list[Gate], Leap]:
        points = supports(start, target)
        lengths = list(zip(points, path.integrals(points, start, target), strict=True))
        gates = [
            Gate(i, length / path.lengths[i] * (1.0 if i == start else LATER_SUPPORT), alpha if i == start else 0.0)
            for i, length in lengths[:OPEN_SUPPORTS]
        ]
        return gates, path.leap(start, target, lengths)

    def count(self, num_steps: int) -> tuple[int, float]:
        pairs = [(k, j) for j in range(1, num_steps) for k in range(j)]
        opened = [min(j - k, OPEN_SUPPORTS) + min(num_steps - j, OPEN_SUPPORTS) for k, j in pairs]
        return max(opened), sum(opened) / len(opened)


def draw_pair(num_steps: int, draws: Draws) -> tuple[int, int]:
    """Two different steps, ascending, every pair equally likely."""
    first, second = draws.randint(0, num_steps - 1), draws.randint(0, num_steps - 2)
    second += second >= first
    return min(first, second), max(first, second)


def draw_late(steps: range, number: int, draws: Draws) -> tuple[int, ...]:
    """`number` different steps, ascending, drawn one after the other with the weights of `LATE_BIAS`.

    Weights count from the beginning of the range.
    """
    left = list(steps)
    chosen = []
    for _ in range(number):
        weights = [float(step - steps.start + 1) ** LATE_BIAS for step in left]
        point = draws.random() * sum(weights)
        index = 0
        while index < len(left) - 1 and point >= weights[index]:
            point -= weights[index]
            index += 1
        chosen.append(left.pop(index))
    return tuple(sorted(chosen))


def supports(start: int, target: int) -> list[int]:
    """Up to SUPPORTS steps of [start, target), evenly spaced, the first and the last among them."""
    last = target - start - 1
    number = min(SUPPORTS, last + 1)
    return [start] if number == 1 else [start + round(last * i / (number - 1)) for i in range(number)]
