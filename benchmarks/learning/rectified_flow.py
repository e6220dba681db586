"""The bundled model as a model of flow matching: its weights, another path from noise to picture.

Its UNet predicts v = cos(a) z - sin(a) x0 at x = cos(a) x0 + sin(a) z. A rectified flow (Liu et al. 2023) has
x' = (1 - s) x0 + s z and predicts z - x0. With tan(a) = s / (1 - s) and x' = x sqrt((1 - s)^2 + s^2) this is

    z - x0 = (sin(a) - cos(a)) x + (cos(a) + sin(a)) v

so no weight changes, and a chain of flow-Euler steps draws what the bundled model draws. The schedule is that of Stable
Diffusion 3.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, ModelMixin, StableDiffusion3Pipeline
from torch import Tensor


class RectifiedFlow(ModelMixin, ConfigMixin):
    """A UNet that predicts v, with the arguments and results of the transformer of Stable Diffusion 3.

    alphas_cumprod: of the schedule that the UNet was trained with.
    """

    def __init__(self, unet: Any, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.angles = alphas_cumprod.double().clamp(0, 1).sqrt().arccos().numpy()  # of the UNet's timesteps, ascending
        self.register_to_config(
            in_channels=unet.config.in_channels,
            sample_size=unet.config.sample_size,
            patch_size=1,
            joint_attention_dim=unet.config.cross_attention_dim,
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """z - x0 [B, C, h, w] at x' [B, C, h, w]. timestep: [B], all equal, 1000 s. The pooled text is not used."""
        s = timestep[0].item() / 1000
        angle = float(np.arctan2(s, 1 - s))
        x = hidden_states / ((1 - s) ** 2 + s**2) ** 0.5
        place = np.interp(angle, self.angles, np.arange(len(self.angles)))
        v = self.unet(x, torch.tensor(place, dtype=torch.float32), encoder_hidden_states, return_dict=False)[0]
        return ((np.sin(angle) - np.cos(angle)) * x + (np.cos(angle) + np.sin(angle)) * v,)


def rectified(pipe: Any) -> StableDiffusion3Pipeline:
    """A pipeline with the same UNet and its adapters, without text encoders: call it with `embeddings_of`."""
    flow = RectifiedFlow(pipe.unet, pipe.scheduler.alphas_cumprod).eval()
    return StableDiffusion3Pipeline(flow, FlowMatchEulerDiscreteScheduler(shift=3.0), pipe.vae, *[None] * 6)


@torch.no_grad()
def embeddings_of(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The text of the prompts, and of none, for a call of the sampler. pipe: the one that `rectified` got."""
    cond, uncond = pipe.encode_prompt(list(prompts), "cpu", 1, do_classifier_free_guidance=True)
    unused = torch.zeros(len(prompts), 1)
    texts = {"prompt_embeds": cond, "pooled_prompt_embeds": unused}
    return texts | {"negative_prompt_embeds": uncond, "negative_pooled_prompt_embeds": unused}
