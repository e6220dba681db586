"""Truncation rules: which gradients of a chain are computed. They are drawn before the chain runs.

With x_next = a x + b y and y = network(x), a step without gradient passes the gradient g of x_next only along its
linear path: dx = a g. A gradient step adds the network's part: dtheta += b g dy/dtheta and, unless the rule stops this
gradient, dx += b g dy/dx.
"""

import random
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Protocol

_RULES = "full, uniform, uniform-once, gaussian, last:K, lv:N, drtune, drtune:K or refl"
DRTUNE_STEPS = 5
DRTUNE_STOP = 0.4
REFL_SHARE = 0.25


class Draws(Protocol):
    """The source of random numbers: Python's module `random`, or a `random.Random`."""

    def randint(self, a: int, b: int, /) -> int: ...

    def gauss(self, mu: float, sigma: float, /) -> float: ...


@dataclass(frozen=True)
class Truncation:
    """The truncation of one chain.

    grad_steps: indices (0 = noisiest) of the steps whose prediction carries gradient.
    input_gradient: whether the gradient also passes through the network's input (dy/dx above).
    last_step: the step at which the chain ends early with the clean latents that it predicts; None: the last step.
    renoisings: how many times the picture is noised to the level of the chain's last step and denoised by that step
        only, with gradient and with its own reward.
    """

    grad_steps: tuple[int, ...]
    input_gradient: bool = True
    last_step: int | None = None
    renoisings: int = 0


def draw_truncation(rule: str, num_steps: int, draws: Draws = random) -> Truncation:
    """The truncation of one chain of `num_steps` by a rule, drawn from `draws` if the rule is random.

    Rules, in addition to those of `draw_gates`:
        lv:N: DRaFT-LV (Clark et al. 2024): last:1, and N times more the gradient of the reward at

                x0_n = (x_n - noise * eps(x_n)) / signal,   x_n = signal * stop(x0) + noise * z_n,   z_n ~ N(0, 1)

            with signal and noise of the chain's last step. The paper sums these 1 + N gradients. We take their mean, so
            that the learning rate keeps its meaning. Costs N more network evaluations and N more reward queries per
            picture.
        drtune, drtune:K: DRTune (Wu et al. 2024): y = network(stop(x)), so that gradients reach early steps only along
            the linear path and cannot explode. The chain ends by predicting x0 at a step drawn from its last 40 %. Of
            the steps up to there K (5), equally spaced from a drawn offset, carry gradient.
        refl: ReFL (Xu et al. 2023): the chain ends by predicting x0 at a step drawn from its last quarter, and only
            this step carries gradient.

    Raises:
        ValueError: the rule is unknown, or its number does not fit the chain.
    """
    name, _, argument = rule.partition(":")
    if name == "lv" and argument.isdigit():
        if int(argument) < 1:
            raise ValueError(f"truncation {rule!r} noises no picture: use lv:1 or more, or last:1")
        return Truncation((num_steps - 1,), renoisings=int(argument))
    if rule == "drtune" or (name == "drtune" and argument.isdigit()):
        return _drtune(_drtune_count(rule, num_steps), num_steps, draws)
    if rule == "refl":
        step = num_steps - draws.randint(1, max(1, round(REFL_SHARE * num_steps)))
        return Truncation((step,), last_step=step)
    return Truncation(draw_gates(rule, num_steps, draws))


def _drtune_count(rule: str, num_steps: int) -> int:
    """K of drtune:K, checked to be in range."""
    argument = rule.partition(":")[2]
    count = int(argument) if argument else min(DRTUNE_STEPS, num_steps)
    if not 1 <= count <= num_steps:
        raise ValueError(f"truncation {rule!r} asks for {count} of {num_steps} steps: use 1 to {num_steps}")
    return count


def _drtune(count: int, num_steps: int, draws: Draws) -> Truncation:
    last = num_steps - draws.randint(1, max(1, round(DRTUNE_STOP * num_steps)))
    count = min(count, last + 1)
    stride = (last + 1) // count
    first = draws.randint(0, last - (count - 1) * stride)
    return Truncation(tuple(range(first, last + 1, stride))[:count], input_gradient=False, last_step=last)


def draw_gates(rule: str, num_steps: int, draws: Draws = random) -> tuple[int, ...]:
    """Indices (0 = noisiest) of the gradient steps of one chain of `num_steps`, for rules that only choose steps.

    Rules:
        full: every step.
        last:K: the K steps nearest the image (DRaFT-K, Clark et al. 2024).
        uniform: step i has gradient iff i >= r, with r ~ U{0..num_steps} drawn for each step (AlignProp, section 4.2
            and its code): about half the steps, later ones more often.
        uniform-once: the last K steps, K ~ U{1..num_steps} drawn once.
        gaussian: the last K steps, K from a normal distribution of mean num_steps / 2 and deviation num_steps / 6,
            rounded and clamped to 1..num_steps.

    Raises:
        ValueError: the rule is unknown, or K is outside 1..num_steps.
    """
    if rule == "uniform-once":
        return tuple(range(num_steps - draws.randint(1, num_steps), num_steps))
    if rule == "gaussian":
        length = round(draws.gauss(num_steps / 2, num_steps / 6))
        return tuple(range(num_steps - min(max(length, 1), num_steps), num_steps))
    name, _, argument = rule.partition(":")
    if rule == "full":
        return tuple(range(num_steps))
    if rule == "uniform":
        return trl_gates(num_steps, True, 0, (0, num_steps), draws)
    if name == "last" and argument.isdigit():
        if not 1 <= int(argument) <= num_steps:
            raise ValueError(f"truncation {rule!r} asks for {argument} of {num_steps} steps: use 1 to {num_steps}")
        return tuple(range(num_steps - int(argument), num_steps))
    raise ValueError(f"unknown truncation {rule!r}: use {_RULES}, for example last:1")


def gate_count(rule: str, num_steps: int) -> tuple[int, float]:
    """The largest and the mean number of gradient steps that `draw_truncation` gives under the rule.

    Draws no random number. Renoisings of lv:N are not counted, because each is a chain of one step that runs after the
    first chain's backward pass.

    Raises:
        ValueError: as `draw_truncation`.
    """
    if rule == "uniform":
        return num_steps, num_steps / 2  # step i has gradient with probability (i + 1) / (num_steps + 1)
    if rule == "uniform-once":
        return num_steps, (num_steps + 1) / 2
    if rule == "gaussian":
        length = NormalDist(num_steps / 2, num_steps / 6)
        return num_steps, 1 + sum(1 - length.cdf(k - 0.5) for k in range(2, num_steps + 1))
    state = random.getstate()
    steps = len(draw_truncation(rule, num_steps).grad_steps)  # raises ValueError for a bad rule
    random.setstate(state)
    if not rule.startswith("drtune"):
        return steps, float(steps)
    count, latest = _drtune_count(rule, num_steps), max(1, round(DRTUNE_STOP * num_steps))
    return count, fmean(min(count, num_steps - back + 1) for back in range(1, latest + 1))


def trl_gates(
    num_steps: int, rand: bool, timestep: int, minmax: tuple[int, int], draws: Draws = random
) -> tuple[int, ...]:
    """Gradient steps from trl 0.23.1's fields. Like trl it draws `randint` once per step, in the order of the steps.

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
