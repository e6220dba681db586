"""Stable Diffusion 1.x and 2.x as a chain: a UNet that predicts noise (or v), with one text encoder."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from alignprop_fast.models.conditioning import Conditioning, PromptBatch
from alignprop_fast.models.pipeline_adapter import PipelineAdapter, instances, text_encoders
from alignprop_fast.models.schedules import DIFFUSION
from alignprop_fast.prompts.limits import TextReader


class StableDiffusionAdapter(PipelineAdapter):
    """`StableDiffusionPipeline` (Rombach et al. 2022); see `PipelineAdapter`."""

    schedulers = DIFFUSION
    embedding_names: ClassVar[Sequence[str]] = ("prompt_embeds",)
    text_parts: ClassVar[Sequence[str]] = ("text_encoder", "tokenizer")

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet

    def encode(self, batch: PromptBatch) -> Conditioning:
        cond, uncond = self.pipe.encode_prompt(
            batch.prompts, self.device, 1, batch.guided, batch.negative_prompts, **batch.embeddings
        )
        return Conditioning(torch.cat([uncond, cond]) if batch.guided else cond, None, 1 + batch.guided)

    def text_readers(self) -> list[TextReader]:
        return self._reader("CLIP", "tokenizer")

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        encoders: list[Any] = list(text_encoders(self.pipe))
        length = encoders[0].config.max_position_embeddings if encoders else 77  # CLIP's
        shape = ((1 + guided) * batch, length, text_width(self.pipe.unet.config))
        embeds = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return Conditioning(embeds, None, 1 + guided)

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        added = None if cond.added is None else dict(cond.added)
        x = torch.cat([x.to(self.dtype)] * cond.branches)
        return self.pipe.unet(x, timestep, cond.embeds, added_cond_kwargs=added, return_dict=False)[0]

    def _unscaled(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.pipe.vae.config.scaling_factor

    def step_groups(self) -> dict[str, list[nn.Module]]:
        return {
            "transformers": instances(self.pipe.unet, (BasicTransformerBlock,)),
            "residuals": instances(self.pipe.unet, (ResnetBlock2D,)),
        }


def text_width(config: Any) -> int:
    """Channels of the text embeddings that a UNet takes."""
    width = config.encoder_hid_dim or config.cross_attention_dim
    return width if isinstance(width, int) else width[0]
