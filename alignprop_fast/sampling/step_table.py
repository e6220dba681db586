"""The coefficients of a chain's steps, and the clean latents and noise implied by a prediction."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StepTable:
    """Coefficients of T steps, index 0 the noisiest: x_next = a x + b y + sigma z at model time `timesteps`."""

    timesteps: tuple[float, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    sigma: tuple[float, ...]
    noisy: bool
    """Whether every step draws noise, even if its sigma is zero, as diffusers does for eta > 0."""
    input_scale: tuple[float, ...] = ()
    """Per step the factor of the network's input: y = network(input_scale x). Empty: all 1."""
    init_scale: float = 1.0
    """The chain starts from this times unit noise."""
    history: tuple[tuple[float, float, float], ...] = ()
    """Per step (c, p, q) of a two-step method: x_next = a x + b y + c h + sigma z and h_next = p x + q y, from h = 0.
    Empty: a one-step method."""
    x0: tuple[tuple[float, float], ...] = ()
    """Per step (c, d): it predicts the clean latents c x + d y. Empty if the update has another form."""
    level: tuple[tuple[float, float], ...] = ()
    """Per step (signal, noise): its x is signal * clean latents + noise * unit noise. Empty as x0."""

    def __len__(self) -> int:
        return len(self.timesteps)

    def ending_at(self, step: int) -> "StepTable":
        """The steps up to `step`, which ends the chain by predicting the clean latents: x_next = x0.

        Raises:
            ValueError: the table has no x0.
        """
        c, d = self._of_every_step(self.x0)[step]
        table = self._rows(0, step + 1)
        return replace(
            table,
            a=(*table.a[:-1], c),
            b=(*table.b[:-1], d),
            sigma=(*table.sigma[:-1], 0.0),
            # The image no longer depends on the previous step.
            history=tuple((0.0 if i == step else c, p, q) for i, (c, p, q) in enumerate(table.history)),
        )

    def alone(self, step: int) -> tuple["StepTable", float]:
        """A chain of only this step, from noised clean latents back to clean ones, and a factor f of their noise z:

            clean = a (signal clean + noise z) + b y + f z

        The last step predicts the clean latents (f = 0). Another one steps to the next level, whose known noise is
        taken away again: Direct-Align, in SRPO (Shen et al. 2025, arXiv 2509.06942).

        Raises:
            ValueError: the table has no x0, or, before the last step, noise or history.
        """
        last = len(self) - 1
        if step == last:
            return self.ending_at(last)._rows(last, last + 1), 0.0
        if self.history or self.noisy:
            raise ValueError(
                "only the last step of a scheduler with noise or memory can be renoised: use ddim with eta 0, euler or "
                "flow-euler, or another truncation, such as lv:1"
            )
        signal, noise = self._of_every_step(self.level)[step + 1]
        row = self._rows(step, step + 1)
        return replace(row, a=(row.a[0] / signal,), b=(row.b[0] / signal,)), -noise / signal

    def _rows(self, first: int, end: int) -> "StepTable":
        """The steps first to end - 1, unchanged."""
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

    def level_of(self, step: int) -> tuple[float, float]:
        """(signal, noise) of the step's x. Raises ValueError as `ending_at`."""
        return self._of_every_step(self.level)[step]

    def _of_every_step(self, entries: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        if len(entries) != len(self):
            raise ValueError("this scheduler has no closed form of x0: use a truncation rule that runs the whole chain")
        return entries


def x0_and_noise(prediction_type: str, alpha: float) -> tuple[tuple[float, float], tuple[float, float]]:
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
