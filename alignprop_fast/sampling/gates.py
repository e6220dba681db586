"""Truncation rules: which steps of a chain carry gradient. Drawn before the chain runs, with Python's `random`.

A detached step passes the gradient on by its linear path only (x_next = a x + b y: dx = a g).
"""

import random
from statistics import NormalDist


def draw_gates(rule: str, num_steps: int) -> tuple[int, ...]:
    """Indices (0 = noisiest) of the gradient steps of one chain of `num_steps`.

    Rules:
        full: every step.
        last:K: the K steps nearest the image (DRaFT-K, Clark et al. 2024).
        uniform: step i is open iff i >= r, r ~ U{0..num_steps} drawn anew for each step (AlignProp, section 4.2 and its
            code: about half the steps, the later the likelier).
        uniform-once: the last K steps, K ~ U{1..num_steps} drawn once.
        gaussian: the last K steps, K from a normal distribution of mean num_steps / 2 and deviation num_steps / 6,
            rounded and held to 1..num_steps.

    Raises:
        ValueError: unknown rule, or K outside 1..num_steps.
    """
    if rule == "uniform-once":
        return tuple(range(num_steps - random.randint(1, num_steps), num_steps))
    if rule == "gaussian":
        length = round(random.gauss(num_steps / 2, num_steps / 6))
        return tuple(range(num_steps - min(max(length, 1), num_steps), num_steps))
    name, _, argument = rule.partition(":")
    if rule == "full":
        return tuple(range(num_steps))
    if rule == "uniform":
        return trl_gates(num_steps, True, 0, (0, num_steps))
    if name == "last" and argument.isdigit():
        if not 1 <= int(argument) <= num_steps:
            raise ValueError(f"truncation {rule!r} asks for {argument} of {num_steps} steps: use 1 to {num_steps}")
        return tuple(range(num_steps - int(argument), num_steps))
    raise ValueError(f"unknown truncation {rule!r}: use full, uniform, uniform-once, gaussian or last:K, say last:1")


def gate_count(rule: str, num_steps: int) -> tuple[int, float]:
    """The most gradient steps that `draw_gates` gives under the rule, and how many it gives on average.

    Raises:
        ValueError: as `draw_gates`.
    """
    if rule == "uniform":
        return num_steps, num_steps / 2  # step i is open with (i + 1) / (num_steps + 1)
    if rule == "uniform-once":
        return num_steps, (num_steps + 1) / 2
    if rule == "gaussian":
        length = NormalDist(num_steps / 2, num_steps / 6)
        return num_steps, 1 + sum(1 - length.cdf(k - 0.5) for k in range(2, num_steps + 1))
    steps = len(draw_gates(rule, num_steps))
    return steps, float(steps)


def trl_gates(num_steps: int, rand: bool, timestep: int, minmax: tuple[int, int]) -> tuple[int, ...]:
    """Gates by trl 0.23.1's fields, drawing `random.randint` once per step in the order of the steps, as trl does.

    rand: step i is open iff i >= r with r ~ U{minmax[0]..minmax[1]}; otherwise iff i >= timestep.

    Raises:
        ValueError: fixed truncation at or beyond the last step, which would leave no gradient at all.
    """
    if rand:
        return tuple(i for i in range(num_steps) if i >= random.randint(minmax[0], minmax[1]))
    if timestep >= num_steps:
        raise ValueError(
            f"truncated_backprop_timestep={timestep} leaves no step with gradient in a chain of {num_steps}: "
            f"use at most {num_steps - 1}"
        )
    return tuple(range(max(timestep, 0), num_steps))
