"""Chroma as a chain: FLUX.1 with T5 alone, a mask over its text, guidance, and one network for all modulation."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock, ChromaTransformerBlock

import alignprop_fast.models.lean.chroma  # noqa: F401  # enters this model's layers in the table of ops
from alignprop_fast.models.conditioning import Conditioning, Embeddings
from alignprop_fast.models.flux import T5_TOKENS, FluxAdapter
from alignprop_fast.prompts.limits import TextReader


class ChromaAdapter(FluxAdapter):
    """`ChromaPipeline` (lodestones 2025); see `PipelineAdapter`.

    In diffusers a text's padding is not hidden: the mask is a number, added to the logits of two tokens that it has
    (diffusers issue 13619). Pictures here are those of diffusers.
    """

    embedding_names: ClassVar[Sequence[str]] = ("prompt_embeds",)
    text_mask = "prompt_attention_mask"
    text_parts = ("text_encoder", "tokenizer")
    has_true_cfg = False
    blocks = (ChromaTransformerBlock, ChromaSingleTransformerBlock)

    def text_readers(self) -> list[TextReader]:
        return self._reader("T5", "tokenizer", T5_TOKENS)

    def _embeddings(self, texts: list[str], given: Embeddings, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(embeds, mask) of the texts, or those given for that side.

        Raises:
            ValueError: embeddings are given without a mask, or with one of another type than the pipeline's.
        """
        embeds, mask = given.get(f"{side}prompt_embeds"), given.get(f"{side}{self.text_mask}")
        if embeds is not None and not (isinstance(mask, torch.Tensor) and mask.is_floating_point()):
            raise ValueError(
                f"{side}prompt_embeds need {side}{self.text_mask} in floating point: give both as encode_prompt makes "
                "them"
            )
        embeds, _, mask, *_ = self.pipe.encode_prompt(
            texts,
            device=self.device,
            prompt_embeds=embeds,
            prompt_attention_mask=mask,
            do_classifier_free_guidance=False,
            max_sequence_length=T5_TOKENS,
        )
        return embeds, mask

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        count, width = (1 + guided) * batch, self.denoiser.config.joint_attention_dim
        embeds = torch.zeros(count, T5_TOKENS, width, dtype=self.dtype, device=self.device)
        return self._conditioning(embeds, embeds.new_ones(count, T5_TOKENS), guided, size)

    def _conditioning(
        self, embeds: torch.Tensor, mask: torch.Tensor, guided: bool, size: tuple[int, int]
    ) -> Conditioning:
        mask = F.pad(mask, (0, self.tokens(size)), value=1)
        return Conditioning(embeds, {"attention_mask": mask, **self._positions(embeds, size)}, 1 + guided)

    def inputs(self, x: torch.Tensor, cond: Conditioning) -> dict[str, Any]:
        return {"encoder_hidden_states": cond.embeds, **(cond.added or {})}
