"""Stable Diffusion XL: two text encoders, conditioning on pooled text and sizes, a decoder that overflows in fp16."""

from dataclasses import replace
from typing import Any

import torch

from alignprop_fast.models.conditioning import Conditioning, PromptBatch
from alignprop_fast.models.pipeline_adapter import PipelineAdapter
from alignprop_fast.models.stable_diffusion import StableDiffusionAdapter
from alignprop_fast.prompts.limits import TextReader


class StableDiffusionXLAdapter(StableDiffusionAdapter):
    """As `StableDiffusionAdapter`, for `StableDiffusionXLPipeline` (Podell et al. 2023)."""

    embedding_names = PipelineAdapter.embedding_names
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def __init__(self, pipe: Any):
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
            raise ValueError(
                "SDXL's own VAE overflows in fp16: load the pipeline in bfloat16, or the VAE in float32 or from the "
                "fp16-fix weights"
            )
        second = pipe.text_encoder_2
        if second is not None and second.config.projection_dim != self._pooled_width(pipe.unet.config):
            raise ValueError(
                "the UNet takes other numbers than text and sizes, like SDXL's refiner, which needs a picture: use "
                "SDXL's base model or a fine-tune of it"
            )
        super().__init__(pipe)

    @staticmethod
    def _pooled_width(config: Any) -> int:
        """Channels of the pooled text, which the UNet takes together with six embedded numbers."""
        return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def reads_text(self, batch: PromptBatch) -> bool:
        zeros = batch.negative_prompts is None and self.pipe.config.force_zeros_for_empty_prompt
        return super().reads_text(replace(batch, guided=False) if zeros else batch)

    def encode(self, batch: PromptBatch) -> Conditioning:
        cond, uncond, pooled, uncond_pooled = self.pipe.encode_prompt(
            batch.prompts,
            device=self.device,
            do_classifier_free_guidance=batch.guided,
            negative_prompt=batch.negative_prompts,
            **batch.embeddings,
        )
        if batch.guided:
            cond, pooled = torch.cat([uncond, cond]), torch.cat([uncond_pooled, pooled])
        return self._with_size(cond, pooled, batch.guided, batch.size)

    def text_readers(self) -> list[TextReader]:
        return [*self._reader("CLIP", "tokenizer"), *self._reader("CLIP", "tokenizer_2")]

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        embeds = super().blank_conditioning(batch, guided, size).embeds
        pooled = embeds.new_zeros(len(embeds), self._pooled_width(self.pipe.unet.config))
        return self._with_size(embeds, pooled, guided, size)

    def _with_size(
        self, embeds: torch.Tensor, pooled: torch.Tensor, guided: bool, size: tuple[int, int]
    ) -> Conditioning:
        # Original size, top left of the crop, target size.
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=embeds.dtype, device=embeds.device).expand(len(embeds), -1)
        return Conditioning(embeds, {"text_embeds": pooled, "time_ids": sizes}, 1 + guided)

    def _unscaled(self, x: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        if getattr(config, "latents_mean", None) is None or getattr(config, "latents_std", None) is None:
            return super()._unscaled(x)
        mean, std = (
            torch.tensor(values, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return x * std / config.scaling_factor + mean
