"""FLUX.1 as a chain: flow matching, packed latents, rotary positions, guidance distilled into the denoiser."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

import alignprop_fast.models.lean.flux  # noqa: F401  # enters this model's layers in the table of ops
from alignprop_fast.models.conditioning import Conditioning, Embeddings, PromptBatch
from alignprop_fast.models.flow_transformer import TokenAdapter
from alignprop_fast.prompts.limits import TextReader

T5_TOKENS = 512


class FluxAdapter(TokenAdapter):
    """`FluxPipeline` (Black Forest Labs 2024); see `PipelineAdapter`."""

    text_parts: ClassVar[Sequence[str]] = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    has_true_cfg = True
    blocks = (FluxTransformerBlock, FluxSingleTransformerBlock)

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
        return Conditioning(embeds, {"pooled_projections": pooled, **self._positions(embeds, size)}, 1 + guided)

    def _positions(self, embeds: torch.Tensor, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Positions [tokens, 3]: text at the origin, image tokens by row and column."""
        rows, columns = self.grid(size)
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        image = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
        return {"img_ids": image.to(embeds.device, embeds.dtype), "txt_ids": embeds.new_zeros(embeds.shape[1], 3)}

    def inputs(self, x: torch.Tensor, cond: Conditioning) -> dict[str, Any]:
        return {"guidance": self.guidance(cond), "encoder_hidden_states": cond.embeds, **(cond.added or {})}
