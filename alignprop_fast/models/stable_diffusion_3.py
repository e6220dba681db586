"""Stable Diffusion 3 and 3.5 as a chain: flow matching, a transformer over image and text tokens, three encoders."""

from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock

import alignprop_fast.models.lean.stable_diffusion_3  # noqa: F401  # enters this model's layers in the table of ops
from alignprop_fast.models.conditioning import Conditioning, PromptBatch
from alignprop_fast.models.flow_transformer import FlowTransformerAdapter
from alignprop_fast.models.schedules import dynamic_shift
from alignprop_fast.prompts.limits import TextReader

CLIP_TOKENS, T5_TOKENS = 77, 256


class StableDiffusion3Adapter(FlowTransformerAdapter):
    """`StableDiffusion3Pipeline` (Esser et al. 2024); see `PipelineAdapter`."""

    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    blocks = (JointTransformerBlock,)

    @property
    def size_multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.patch_size

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, size: tuple[int, int]) -> None:
        scheduler.set_timesteps(num_inference_steps, **dynamic_shift(scheduler.config, self.tokens(size)))

    def encode(self, batch: PromptBatch) -> Conditioning:
        cond, uncond, pooled, uncond_pooled = self.pipe.encode_prompt(
            batch.prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=batch.guided,
            negative_prompt=batch.negative_prompts,
            max_sequence_length=T5_TOKENS,
            **batch.embeddings,
        )
        if batch.guided:
            cond, pooled = torch.cat([uncond, cond]), torch.cat([uncond_pooled, pooled])
        return Conditioning(cond, {"pooled_projections": pooled}, 1 + batch.guided)

    def text_readers(self) -> list[TextReader]:
        clip = self.pipe.tokenizer_max_length  # used for both, even if the second tokenizer has another
        return [
            *self._reader("CLIP", "tokenizer", clip),
            *self._reader("CLIP", "tokenizer_2", clip),
            *self._reader("T5", "tokenizer_3", T5_TOKENS),
        ]

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        count, config = (1 + guided) * batch, self.denoiser.config
        embeds = torch.zeros(
            count, CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim, dtype=self.dtype, device=self.device
        )
        pooled = embeds.new_zeros(count, config.pooled_projection_dim)
        return Conditioning(embeds, {"pooled_projections": pooled}, 1 + guided)

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        x = torch.cat([x.to(self.dtype)] * cond.branches)
        return self.denoiser(
            hidden_states=x,
            timestep=timestep.expand(len(x)),
            encoder_hidden_states=cond.embeds,
            **(cond.added or {}),
            return_dict=False,
        )[0]
