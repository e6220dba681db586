"""Euler's method and its ancestral variant as tables of coefficients (see `StepTable`), by noise levels sigma.

x are the clean latents plus sigma times unit noise, so dx / dsigma = (x - x0) / sigma (Karras et al. 2022, eq. 4), and

    x_next = x + (sigma_down - sigma) (x - x0) / sigma + sigma_up z

with sigma_down = sigma_next and sigma_up = 0, or, ancestral, sigma_up^2 = sigma_next^2 (1 - sigma_next^2 / sigma^2) and
sigma_down^2 = sigma_next^2 - sigma_up^2. x0 is linear in x and the model output y. Flow matching (Lipman et al. 2023;
x = (1 - sigma) x0 + sigma noise, y = dx / dsigma) has epsilon prediction's update, x + (sigma_next - sigma) y.
"""

from collections.abc import Sequence
from itertools import pairwise

from alignprop_fast.sampling.step_table import StepTable


def euler_table(
    sigmas: Sequence[float],
    timesteps: Sequence[float],
    prediction_type: str = "epsilon",
    ancestral: bool = False,
    init_scale: float = 1.0,
) -> StepTable:
    """Coefficients of Euler's method.

    Args:
        sigmas: T + 1 noise levels, noisiest first, the last one that of the image.
        timesteps: the model times of the first T of them.
        prediction_type: epsilon, v_prediction, sample, or flow (whose network gets x unscaled).
        ancestral: remove more noise than the step needs and add new noise.
        init_scale: the chain starts from this times unit noise.

    Raises:
        ValueError: the prediction type is unknown.
    """
    a, b, noise, scales, x0s, levels = [], [], [], [], [], []
    for sigma, sigma_next in pairwise(sigmas):
        up = sigma_next * max(1 - (sigma_next / sigma) ** 2, 0.0) ** 0.5 if ancestral else 0.0
        change = (sigma_next**2 - up**2) ** 0.5 - sigma
        by_x, by_y = _derivative(prediction_type, sigma)
        a.append(1 + change * by_x)
        b.append(change * by_y)
        noise.append(up)
        scales.append(1.0 if prediction_type == "flow" else (sigma**2 + 1) ** -0.5)
        x0s.append((1 - sigma * by_x, -sigma * by_y))
        levels.append((1 - sigma if prediction_type == "flow" else 1.0, sigma))
    return StepTable(
        tuple(timesteps),
        tuple(a),
        tuple(b),
        tuple(noise),
        ancestral,
        input_scale=tuple(scales),
        init_scale=init_scale,
        x0=tuple(x0s),
        level=tuple(levels),
    )


def _derivative(prediction_type: str, sigma: float) -> tuple[float, float]:
    """The coefficients of x and of y in dx / dsigma."""
    if prediction_type in ("epsilon", "flow"):
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return sigma / (sigma**2 + 1), (sigma**2 + 1) ** -0.5
    if prediction_type == "sample":
        return 1 / sigma, -1 / sigma
    raise ValueError(f"unknown prediction type {prediction_type!r}: use epsilon, v_prediction, sample or flow")
