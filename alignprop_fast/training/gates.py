"""Which denoising steps of a micro-batch carry gradient: the config's rule and its random numbers."""

from __future__ import annotations

import random

from alignprop_fast.sampling import Draws, StepTable, Truncation, draw_truncation, gate_count, trl_gates
from alignprop_fast.training.config import AlignPropConfig


def truncation_of(config: AlignPropConfig, table: StepTable, draws: Draws = random) -> Truncation:
    """The truncation of a chain with this table by the config's `truncation`, or else by trl's three fields.

    Raises:
        ValueError: the rule is unknown, or does not support this number of steps or this scheduler.
    """
    if config.truncation is not None:
        return draw_truncation(config.truncation, table, draws)
    gates = trl_gates(
        config.sample_num_steps,
        config.truncated_backprop_rand,
        config.truncated_backprop_timestep,
        config.truncated_rand_backprop_minmax,
        draws,
    )
    return Truncation.at(gates)


def check_rule(config: AlignPropConfig) -> None:
    """Raises ValueError if the config's rule is unknown, or does not support this number of steps."""
    if config.truncation is not None:
        gate_count(config.truncation, config.sample_num_steps)


def gate_draws(config: AlignPropConfig, processes: int, step: int, micro_batch: int) -> Draws:
    """The random numbers for the gates of a micro-batch: Python's `random`, as in trl.

    Several processes must draw the same gates, because they all wait for the one with the most gradient steps. So they
    use the seed, the step and the micro-batch. Nothing must be kept in a checkpoint, and a repetition draws the same.
    """
    return random if processes == 1 else random.Random(f"gates {config.seed} {step} {micro_batch}")
