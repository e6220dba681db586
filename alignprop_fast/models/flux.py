"""FLUX.1 as a chain: flow matching, packed latents, rotary positions, guidance distilled into the denoiser."""

from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn

import alignprop_fast.models.lean.flux  # noqa: F401  # enters this model's layers in the table of ops
from alignprop_fast.models.pipeline_adapter import Conditioning, Embeddings, PipelineAdapter, PromptBatch, instances
from alignprop_fast.models.schedules import FLOW, dynamic_shift
from alignprop_fast.prompts.limits import TextReader

T5_TOKENS = 512


class FluxAdapter(PipelineAdapter):
    """`FluxPipeline` (Black Forest Labs 2024); see `PipelineAdapter`.

    The chain's latents are [B, C, h, w]; the transformer sees each 2 x 2 patch of them as one token.
    """

    schedulers = FLOW
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    embeds_guidance = True
    channels_per_latent = 4

    @property
    def denoiser(self) -> Any:
        return self.pipe.transformer

    @property
    def size_multiple(self) -> int:
        return 2 * self.pipe.vae_scale_factor

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, size: tuple[int, int]) -> None:
        rows, columns = self._grid(size)
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas, **dynamic_shift(scheduler.config, rows * columns))

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return size[0] // self.size_multiple, size[1] // self.size_multiple

    def encode(self, batch: PromptBatch) -> Conditioning:
        negative_prompts = batch.negative_prompts or [""] * len(batch.prompts)
        found = [self._embeddings(negative_prompts, batch.embeddings, "negative_")] if batch.guided else []
        found.append(self._embeddings(batch.prompts, batch.embeddings, ""))
        embeds, pooled = map(torch.cat, zip(*found, strict=True))
        return self._conditioning(embeds, pooled, batch.guided, batch.size)

    def text_readers(self) -> list[TextReader]:
        return [*self._reader("CLIP", "tokenizer"), *self._reader("T5", "tokenizer_2", T5_TOKENS)]

    def _embeddings(self, texts: list[str], given: Embeddings, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(embeds, pooled) of the texts, or the embeddings given for that side."""
        known = {name: given.get(side + name) for name in self.embedding_names}
        embeds, pooled, _ = self.pipe.encode_prompt(
            texts, None, device=self.device, max_sequence_length=T5_TOKENS, **known
        )
        return embeds, pooled

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        count, config = (1 + guided) * batch, self.denoiser.config
        embeds = torch.zeros(count, T5_TOKENS, config.joint_attention_dim, dtype=self.dtype, device=self.device)
        return self._conditioning(embeds, embeds.new_zeros(count, config.pooled_projection_dim), guided, size)

    def _conditioning(
        self, embeds: torch.Tensor, pooled: torch.Tensor, guided: bool, size: tuple[int, int]
    ) -> Conditioning:
        """The conditioning with positions [tokens, 3]: text at the origin, image tokens by row and column."""
        rows, columns = self._grid(size)
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        image = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
        added = {
            "pooled_projections": pooled,
            "img_ids": image.to(embeds.device, embeds.dtype),
            "txt_ids": embeds.new_zeros(embeds.shape[1], 3),
        }
        return Conditioning(embeds, added, 1 + guided)

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        tokens_BNC = _pack(torch.cat([x.to(self.dtype)] * cond.branches))
        told = self.denoiser.config.guidance_embeds
        y = self.denoiser(
            hidden_states=tokens_BNC,
            timestep=timestep.expand(len(tokens_BNC)) / 1000,
            guidance=self._guidance(cond, tokens_BNC) if told else None,
            encoder_hidden_states=cond.embeds,
            **(cond.added or {}),
            return_dict=False,
        )[0]
        return _unpack(y, x.shape[-2] // 2)

    @staticmethod
    def _guidance(cond: Conditioning, tokens_BNC: torch.Tensor) -> torch.Tensor:
        """The guidance scale, once for each row."""
        scale, rows = cond.embedded_guidance, len(tokens_BNC)
        if isinstance(scale, torch.Tensor):
            return scale.to(tokens_BNC.device, torch.float32).expand(rows)
        return torch.full((rows,), scale, device=tokens_BNC.device)

    def step_groups(self) -> dict[str, list[nn.Module]]:
        return {"transformers": instances(self.denoiser, (FluxTransformerBlock, FluxSingleTransformerBlock))}


def _pack(x_BCHW: torch.Tensor) -> torch.Tensor:
    """[B, C, 2 R, 2 S] as [B, R S, 4 C]."""
    patches = x_BCHW.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, R, 2, S, 2]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpack(x_BNC: torch.Tensor, rows: int) -> torch.Tensor:
    """[B, R S, 4 C] as [B, C, 2 R, 2 S]."""
    patches = x_BNC.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, -1))  # [B, R, S, C, 2, 2]
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
