"""DPM-Solver++ 2M (Lu et al. 2022, algorithm 2) as a table of coefficients with history (see `StepTable`).

x = alpha x0 + alpha s noise, with the noise level s and alpha = (1 + s^2)^(-1/2). In flow matching alpha = 1 / (1 + s),
sigma = alpha s and x0 = x - sigma y (Xie et al. 2024, Flow-DPM-Solver). With h = log(s / s_next), the prediction m = x0
of this step, and m' and h' of the step before,

    x_next = (alpha_next s_next) / (alpha s) x + alpha_next (1 - s_next / s) (m + k / r (m - m')),    r = h' / h

where k = 1/2 (midpoint), or k = 1 / (1 - s_next / s) - 1 / h (Heun), or 0 (first order). m is linear in x and y.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from alignprop_fast.sampling.step_table import StepTable, x0_and_noise


def dpm_solver_table(
    sigmas: Sequence[float],
    timesteps: Sequence[float],
    prediction_type: str = "epsilon",
    solver_type: str = "midpoint",
    second_order_steps: Sequence[int] = (),
) -> StepTable:
    """Coefficients of DPM-Solver++ of first and second order.

    Args:
        sigmas: T + 1 noise levels s, noisiest first, the last one that of the image; in flow matching sigma.
        timesteps: the model times of the first T of them.
        prediction_type: epsilon, v_prediction, sample or flow.
        solver_type: midpoint or heun.
        second_order_steps: indices (at least 1) of the steps that use the previous prediction; the others do not.

    Raises:
        ValueError: the prediction type or the solver type is unknown.
    """
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"unknown solver type {solver_type!r}: use midpoint or heun")
    is_flow = prediction_type == "flow"
    if is_flow:
        sigmas = [sigma / (1 - sigma) for sigma in sigmas]
    a, b, history, levels = [], [], [], []
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        alpha, alpha_next = _signal(s, is_flow), _signal(s_next, is_flow)
        (p, q), _ = ((1.0, -alpha * s), None) if is_flow else x0_and_noise(prediction_type, 1 / (1 + s**2))
        gain, extra = alpha_next * (1 - s_next / s), 0.0
        if i in second_order_steps:
            h, h_before = math.log(s / s_next), math.log(sigmas[i - 1] / s)
            share = 0.5 if solver_type == "midpoint" else 1 / (1 - s_next / s) - 1 / h
            extra = gain * share * h / h_before
        a.append(alpha_next * s_next / (alpha * s) + (gain + extra) * p)
        b.append((gain + extra) * q)
        history.append((-extra, p, q))
        levels.append((alpha, alpha * s))
    return StepTable(
        tuple(timesteps),
        tuple(a),
        tuple(b),
        (0.0,) * len(a),
        noisy=False,
        history=tuple(history) if second_order_steps else (),
        x0=tuple((p, q) for _, p, q in history),
        level=tuple(levels),
    )


def _signal(s: float, is_flow: bool) -> float:
    """alpha at noise level s."""
    return 1 / (1 + s) if is_flow else (1 + s**2) ** -0.5
