"""The LoRA of one module: two factors and a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Values of PEFT's init_lora_weights that leave the base model as it is.
LEAVES_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Factors:
    """One module's delta = scale * up @ down.

    down: [rank, in] or [rank, in, kh, kw]; up: [out, rank] or [out, rank, 1, 1]; scale: alpha / rank, or alpha /
    sqrt(rank) of rank-stabilised LoRA.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def places(self) -> tuple[int, ...]:
        """The shape of the delta: [out, in] or [out, in, kh, kw]."""
        return (self.up.shape[0], *self.down.shape[1:])

    def scaled_up(self) -> torch.Tensor:
        """scale * up."""
        return self.up if self.scale == 1 else self.scale * self.up

    def delta(self) -> torch.Tensor:
        """scale * up @ down, of shape `places`."""
        return (self.scaled_up().flatten(1) @ self.down.flatten(1)).reshape(self.places)


Lora = dict[str, Factors]  # by the module's name in diffusers, such as unet.mid_block.attentions.0....to_q
