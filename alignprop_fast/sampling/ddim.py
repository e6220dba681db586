"""DDIM (Song et al. 2021) as a table of coefficients: every update is x_next = a x + b y + sigma z.

x are the latents, y the (guided) model output, z unit noise. With alpha = alphas_cumprod[t], alpha' that of the next
step and sigma = eta sqrt((1 - alpha') / (1 - alpha)) sqrt(1 - alpha / alpha') (eq. 16), eq. 12 reads

    x_next = sqrt(alpha') x0 + sqrt(1 - alpha' - sigma^2) eps + sigma z

and x0 and eps are linear in x and y for each prediction type, which gives a and b.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StepTable:
    """Coefficients of T steps, index 0 the noisiest: x_next = a x + b y + sigma z at model time `timesteps`."""

    timesteps: tuple[float, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    sigma: tuple[float, ...]
    noisy: bool
    """Whether noise is drawn at every step (also where sigma happens to be zero), as diffusers does for eta > 0."""
    input_scale: tuple[float, ...] = ()
    """Per step the factor of the network's input: y = network(input_scale x). Empty: 1."""
    init_scale: float = 1.0
    """The chain starts from this times unit noise."""
    history: tuple[tuple[float, float, float], ...] = ()
    """Per step (c, p, q) of a two-step method: x_next = a x + b y + c h + sigma z and h_next = p x + q y, from h = 0.
    Empty: a one-step method."""
    x0: tuple[tuple[float, float], ...] = ()
    """Per step (c, d): the clean latents that it predicts are c x + d y. Empty where the update is of another form."""
    level: tuple[tuple[float, float], ...] = ()
    """Per step (signal, noise): its x is signal * clean latents + noise * unit noise. Empty as for x0."""

    def __len__(self) -> int:
        return len(self.timesteps)

    def ending_at(self, step: int) -> "StepTable":
        """The steps before `step`, which then predicts the clean latents at once: x_next = x0, and the chain is over.

        Raises:
            ValueError: a table that does not know x0.
        """
        c, d = self._of_every_step(self.x0)[step]
        table = self._rows(0, step + 1)
        return replace(
            table,
            a=(*table.a[:-1], c),
            b=(*table.b[:-1], d),
            sigma=(*table.sigma[:-1], 0.0),
            # Of the step before the image does not depend any more.
            history=tuple((0.0 if i == step else c, p, q) for i, (c, p, q) in enumerate(table.history)),
        )

    def last_alone(self) -> "StepTable":
        """A chain of one step: the last one, predicting the clean latents. Raises ValueError as `ending_at`."""
        last = len(self) - 1
        return self.ending_at(last)._rows(last, last + 1)

    def _rows(self, first: int, end: int) -> "StepTable":
        """The steps first to end - 1 as they are."""
        return replace(
            self,
            timesteps=self.timesteps[first:end],
            a=self.a[first:end],
            b=self.b[first:end],
            sigma=self.sigma[first:end],
            input_scale=self.input_scale[first:end],
            history=self.history[first:end],
            x0=self.x0[first:end],
            level=self.level[first:end],
        )

    def last_level(self) -> tuple[float, float]:
        """(signal, noise) of the last step's x. Raises ValueError as `ending_at`."""
        return self._of_every_step(self.level)[-1]

    def _of_every_step(self, entries: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        if len(entries) != len(self):
            raise ValueError("this scheduler has no closed form of x0: use a truncation that runs the chain to its end")
        return entries


def _x0_eps(prediction_type: str, alpha: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """((x0 per x, x0 per y), (eps per x, eps per y)) at signal level alpha."""
    signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    if prediction_type == "epsilon":
        if alpha == 0:
            raise ValueError("a zero-terminal-SNR schedule cannot predict epsilon: use a v_prediction model")
        return (1 / signal, -noise / signal), (0.0, 1.0)
    if prediction_type == "v_prediction":
        return (signal, -noise), (noise, signal)
    if prediction_type == "sample":
        return (0.0, 1.0), (1 / noise, -signal / noise)
    raise ValueError(f"unknown prediction type {prediction_type!r}: use epsilon, v_prediction or sample")


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
        final_alpha_cumprod: the level that stands for "before timestep 0".
        timesteps: the T timesteps, noisiest first.
        stride: distance in training timesteps from one step to the next.
        eta: 0 is deterministic, 1 has the noise of DDPM.

    Raises:
        ValueError: eta outside [0, 1], an unknown prediction type, or epsilon prediction at zero signal.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, but must lie between 0 (deterministic) and 1 (DDPM noise)")
    a, b, sigmas, x0s, levels = [], [], [], [], []
    for t in timesteps:
        alpha = float(alphas_cumprod[t])
        alpha_next = float(alphas_cumprod[t - stride]) if t >= stride else float(final_alpha_cumprod)
        sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
        # Rounding can leave a difference of -1e-17 where eta = 1 takes all of the noise.
        direction = max(1 - alpha_next - sigma**2, 0.0) ** 0.5
        x0, eps = _x0_eps(prediction_type, alpha)
        a.append(alpha_next**0.5 * x0[0] + direction * eps[0])
        b.append(alpha_next**0.5 * x0[1] + direction * eps[1])
        sigmas.append(sigma)
        x0s.append(x0)
        levels.append((alpha**0.5, (1 - alpha) ** 0.5))
    steps = tuple(int(t) for t in timesteps)
    return StepTable(steps, tuple(a), tuple(b), tuple(sigmas), eta > 0, x0=tuple(x0s), level=tuple(levels))
