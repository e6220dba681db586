"""The affine part of a chain, forward and adjoint, on the chain's state.

The state of a one-step method is the latents x [B, ...]. That of a two-step method is [2, B, ...]: x, and the history h
from the step before. With the branches of y blended into the guided prediction, y = sum_k blend_k y_k,

    x_next = a x + b y + c h + sigma z        h_next = p x + q y

and for gradients g of x_next and e of h_next: gx = a g + p e, gh = c g, gy_k = blend_k (b g + q e).
"""

from collections.abc import Sequence

import torch

from alignprop_fast.ops.guided_step import guided_step, guided_step_adjoint
from alignprop_fast.sampling.step_table import StepTable


class Update:
    """The updates of a table. blend: the weight of each branch of the prediction, (1,) or (1 - s, s)."""

    def __init__(self, table: StepTable, blend: Sequence[float]):
        self.table, self.blend = table, tuple(blend)

    def start(self, x: torch.Tensor) -> torch.Tensor:
        """The state before the first step, from latents x [B, ...]."""
        return torch.stack([x, torch.zeros_like(x)]) if self.table.history else x

    def latents(self, state: torch.Tensor) -> torch.Tensor:
        """x [B, ...] in a state."""
        return state[0] if self.table.history else state

    def model_input(self, i: int, state: torch.Tensor) -> torch.Tensor:
        """The network's input at step i, [B, ...]."""
        x = self.latents(state)
        return x * self.table.input_scale[i] if self.table.input_scale else x

    def advance(self, i: int, state: torch.Tensor, y: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """The state after step i. y: [len(blend) * B, ...]; noise: unit noise [B, ...] or None."""
        x, a, b, sigma = self.latents(state), self.table.a[i], self.table.b[i], self.table.sigma[i]
        x_next = guided_step(x, y, noise, a, self._weights(b), sigma)
        if not self.table.history:
            return x_next
        c, p, q = self.table.history[i]
        return torch.stack([x_next.add_(state[1], alpha=c), guided_step(x, y, None, p, self._weights(q))])

    def adjoint(
        self, i: int, g: torch.Tensor, y_dtype: torch.dtype, weight: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the state before step i and of y, from the gradient g of the state after it.

        weight: factor of the gradient of y.
        """
        a, b = self.table.a[i], self.table.b[i] * weight
        if not self.table.history:
            return guided_step_adjoint(g, a, self._weights(b), y_dtype)
        c, p, q = self.table.history[i]
        g_x, g_h = g
        _, gy = guided_step_adjoint(b * g_x + weight * q * g_h, 1.0, self.blend, y_dtype)
        return torch.stack([a * g_x + p * g_h, c * g_x]), gy

    def blended(self, y: torch.Tensor) -> torch.Tensor:
        """The guided prediction sum_k blend_k y_k [B, ...] of y [len(blend) * B, ...]."""
        branches = y.chunk(len(self.blend))
        return guided_step(torch.zeros_like(branches[0]), y, None, 0.0, self.blend)

    def blended_adjoint(self, g: torch.Tensor) -> torch.Tensor:
        """The gradient of y, [len(blend) * B, ...], from that of the guided prediction."""
        return guided_step_adjoint(g, 0.0, self.blend, g.dtype)[1]

    def _weights(self, b: float) -> tuple[float, ...]:
        return tuple(b * share for share in self.blend)
