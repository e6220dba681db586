"""Which denoising steps of a micro-batch carry gradient: the config's rule, and where its random numbers come from."""

from __future__ import annotations

import random

from alignprop_fast.sampling import Draws, Truncation, draw_truncation, trl_gates
from alignprop_fast.training.config import AlignPropConfig


def truncation_of(config: AlignPropConfig, draws: Draws = random) -> Truncation:
    """What `truncation` says, or else trl's three fields.

    Raises:
        ValueError: an unknown rule, or one that does not go with so many steps.
    """
    if config.truncation is not None:
        return draw_truncation(config.truncation, config.sample_num_steps, draws)
    gates = trl_gates(
        config.sample_num_steps,
        config.truncated_backprop_rand,
        config.truncated_backprop_timestep,
        config.truncated_rand_backprop_minmax,
        draws,
    )
    return Truncation(gates)


def gate_draws(config: AlignPropConfig, processes: int, step: int, micro_batch: int) -> Draws:
    """What the gates of a micro-batch are drawn from: Python's `random`, where trl draws them.

    Several processes must draw the same, since the one with the most gradient steps sets the pace. So they draw from
    the seed, the step and the micro-batch: nothing has to be kept in a checkpoint, and a repetition draws them again.
    """
    return random if processes == 1 else random.Random(f"gates {config.seed} {step} {micro_batch}")
