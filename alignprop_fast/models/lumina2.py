"""Lumina 2 as a chain: flow matching, texts of any length from Gemma 2, guidance that keeps the norm of each row."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.models.transformers.transformer_lumina2 import Lumina2TransformerBlock

import alignprop_fast.models.lean.lumina2  # noqa: F401  # enters this model's layers in the tables of ops
from alignprop_fast.models.conditioning import Conditioning, Embeddings, PromptBatch, padded
from alignprop_fast.models.flow_transformer import FlowTransformerAdapter
from alignprop_fast.models.lean.lumina2_network import run_network, turns
from alignprop_fast.models.schedules import dynamic_shift
from alignprop_fast.prompts.limits import TextReader

TEXT_TOKENS = 256  # that are read, with the system's prompt
_MULTIPLE = 32  # to which texts of different lengths are padded, so that a CUDA graph serves more of them


class Lumina2Adapter(FlowTransformerAdapter):
    """`Lumina2Pipeline` (Lumina-Image 2.0, Qin et al. 2025, arXiv 2503.21758); see `PipelineAdapter`.

    The transformer's time is the share of noise that is gone. Its output points from noise to picture, so `predict`
    negates it. Guidance is as with the pipeline's defaults: `cfg_normalization` on, all steps guided.
    """

    embedding_names: ClassVar[Sequence[str]] = ("prompt_embeds",)
    text_mask = "prompt_attention_mask"
    text_parts = ("text_encoder", "tokenizer")
    keeps_norm = "rows"
    blocks = (Lumina2TransformerBlock,)

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, size: tuple[int, int]) -> None:
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        # The pipeline takes the number of channels for that of tokens.
        scheduler.set_timesteps(sigmas=sigmas, **dynamic_shift(scheduler.config, self.latent_channels))

    def encode(self, batch: PromptBatch) -> Conditioning:
        self._check_masks(batch.embeddings)
        embeds, mask, *negative = self.pipe.encode_prompt(
            batch.prompts,
            batch.guided,
            batch.negative_prompts,
            device=self.device,
            max_sequence_length=TEXT_TOKENS,
            **batch.embeddings,
        )
        sides = [tuple(negative), (embeds, mask)] if batch.guided else [(embeds, mask)]
        texts = [row[kept.bool()] for side in sides for row, kept in zip(*side, strict=True)]
        return self._conditioning(texts, batch.guided, batch.size)

    def _check_masks(self, given: Embeddings) -> None:
        """Raises ValueError if embeddings have no mask, or padding before text, which would move its positions."""
        for name in (f"{side}prompt_embeds" for side in ("", "negative_") if f"{side}prompt_embeds" in given):
            mask = given.get(name.replace("embeds", "attention_mask"))
            if not isinstance(mask, torch.Tensor) or (mask[:, 1:] > mask[:, :-1]).any():
                raise ValueError(
                    f"{name} need a mask with all padding at the end: give {name.replace('embeds', 'attention_mask')}"
                )

    def text_readers(self) -> list[TextReader]:
        return self._reader("Gemma 2", "tokenizer", TEXT_TOKENS, self._in_chat)

    def _in_chat(self, text: str, tokenizer: Any) -> str:
        return f"{self.pipe.system_prompt} <Prompt Start> {text}"

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        text = torch.zeros(TEXT_TOKENS, self.denoiser.config.cap_feat_dim, dtype=self.dtype, device=self.device)
        return self._conditioning([text] * ((1 + guided) * batch), guided, size)

    def _conditioning(self, texts: Sequence[torch.Tensor], guided: bool, size: tuple[int, int]) -> Conditioning:
        embeds, lengths = padded(texts, TEXT_TOKENS)
        counted = torch.tensor(lengths, dtype=torch.int32, device="cpu")
        turned = turns(self.denoiser, self.grid(size), embeds.shape[1], counted)
        added = {"lengths": counted.to(embeds.device), "turns": turned.to(embeds.device)}
        return Conditioning(embeds, added, 1 + guided, lengths=lengths, multiple=_MULTIPLE)

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        added, (longest, alike) = cond.added or {}, cond.extent
        x_BCHW = torch.cat([x.to(self.dtype)] * cond.branches)
        time = (1 - timestep / 1000).expand(len(x_BCHW))
        image = added["turns"].shape[1] - cond.embeds.shape[1]
        text, turned = cond.embeds[:, :longest], added["turns"][:, : image + longest]
        return -run_network(self.denoiser, x_BCHW, time, text, turned, added["lengths"], alike)
