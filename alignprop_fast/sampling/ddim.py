"""DDIM (Song et al. 2021) as a table of coefficients: every update is x_next = a x + b y + sigma z.

x are the latents, y the (guided) model output, z unit noise. With alpha = alphas_cumprod[t], alpha' that of the next
step and sigma = eta sqrt((1 - alpha') / (1 - alpha)) sqrt(1 - alpha / alpha') (eq. 16), eq. 12 reads

    x_next = sqrt(alpha') x0 + sqrt(1 - alpha' - sigma^2) eps + sigma z

and x0 and eps are linear in x and y for each prediction type, which gives a and b.
"""

from collections.abc import Sequence

from alignprop_fast.sampling.step_table import StepTable, x0_and_noise


def ddim_table(
    alphas_cumprod: Sequence[float],
    final_alpha_cumprod: float,
    timesteps: Sequence[int],
    stride: int,
    eta: float,
    prediction_type: str = "epsilon",
) -> StepTable:
    """Coefficients of DDIM sampling.

    Args:
        alphas_cumprod: signal level per training timestep.
        final_alpha_cumprod: the signal level after the last step, "before timestep 0".
        timesteps: the T timesteps, noisiest first.
        stride: distance in training timesteps from one step to the next.
        eta: 0 is deterministic, 1 has the noise of DDPM.

    Raises:
        ValueError: eta is outside [0, 1], the prediction type is unknown, or epsilon is predicted at zero signal.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, but must be between 0 (deterministic) and 1 (DDPM noise)")
    a, b, sigmas, x0s, levels = [], [], [], [], []
    for t in timesteps:
        alpha = float(alphas_cumprod[t])
        alpha_next = float(alphas_cumprod[t - stride]) if t >= stride else float(final_alpha_cumprod)
        sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
        # With eta = 1 rounding can make this difference -1e-17.
        direction = max(1 - alpha_next - sigma**2, 0.0) ** 0.5
        x0, eps = x0_and_noise(prediction_type, alpha)
        a.append(alpha_next**0.5 * x0[0] + direction * eps[0])
        b.append(alpha_next**0.5 * x0[1] + direction * eps[1])
        sigmas.append(sigma)
        x0s.append(x0)
        levels.append((alpha**0.5, (1 - alpha) ** 0.5))
    steps = tuple(int(t) for t in timesteps)
    return StepTable(steps, tuple(a), tuple(b), tuple(sigmas), eta > 0, x0=tuple(x0s), level=tuple(levels))
