"""What pipelines with flow matching and a transformer share: the size of patches, blocks, latents as tokens."""

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from alignprop_fast.models.conditioning import Conditioning
from alignprop_fast.models.pipeline_adapter import PipelineAdapter, instances
from alignprop_fast.models.schedules import FLOW, dynamic_shift


class FlowTransformerAdapter(PipelineAdapter):
    """A pipeline with flow matching whose denoiser is a transformer over patches of 2 x 2 latents."""

    schedulers = FLOW
    blocks: ClassVar[tuple[type[nn.Module], ...]]
    """Classes of the denoiser's transformer blocks."""

    @property
    def denoiser(self) -> Any:
        return self.pipe.transformer

    @property
    def size_multiple(self) -> int:
        return 2 * self.pipe.vae_scale_factor

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return size[0] // self.size_multiple, size[1] // self.size_multiple

    def tokens(self, size: tuple[int, int]) -> int:
        """Image tokens of a picture of this size in pixels."""
        rows, columns = self.grid(size)
        return rows * columns

    def step_groups(self) -> dict[str, list[nn.Module]]:
        return {"transformers": instances(self.denoiser, self.blocks)}


class TokenAdapter(FlowTransformerAdapter):
    """A pipeline whose denoiser takes and returns tokens [B, N, 4 C], patches of the chain's latents [B, C, h, w]."""

    channels_per_latent = 4

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, size: tuple[int, int]) -> None:
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas, **dynamic_shift(scheduler.config, self.tokens(size)))

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        tokens_BNC = self.pack(torch.cat([x.to(self.dtype)] * cond.branches))
        time_B = timestep.expand(len(tokens_BNC)) / 1000
        return self.unpack(self.run(hidden_states=tokens_BNC, timestep=time_B, **self.inputs(x, cond)), x)

    def run(self, **inputs: Any) -> torch.Tensor:
        """The denoiser's output [B, N, 4 C]."""
        return self.denoiser(**inputs, return_dict=False)[0]

    @abstractmethod
    def inputs(self, x: torch.Tensor, cond: Conditioning) -> dict[str, Any]:
        """The denoiser's arguments besides tokens and time, at latents x [B, C, h, w]."""

    def guidance(self, cond: Conditioning) -> torch.Tensor | None:
        """The guidance scale [K * B], if guidance is distilled into the denoiser with its scale as an input."""
        if not self.denoiser.config.guidance_embeds:
            return None
        scale, rows, device = cond.embedded_guidance, len(cond.embeds), cond.embeds.device
        if isinstance(scale, torch.Tensor):
            return scale.to(device, torch.float32).expand(rows)
        return torch.full((rows,), scale, device=device)

    def pack(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, C, 2 R, 2 S] as [B, R S, 4 C]."""
        patches = x_BCHW.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, R, 2, S, 2]
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpack(self, y_BNC: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Undo `pack` of latents with the height of x."""
        patches = y_BNC.unflatten(2, (-1, 2, 2)).unflatten(1, (x.shape[-2] // 2, -1))  # [B, R, S, C, 2, 2]
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
