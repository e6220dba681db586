"""Qwen-Image as a chain: flow matching, texts of any length, guidance that keeps the norm of each prediction."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

import alignprop_fast.models.lean.qwen_image  # noqa: F401  # enters this model's layers in the tables of ops
from alignprop_fast.models.pipeline_adapter import Conditioning, Embeddings, PromptBatch, padded
from alignprop_fast.models.qwen_chat import QWEN_TOKENS
from alignprop_fast.models.qwen_vae import QwenVaeAdapter
from alignprop_fast.prompts.limits import TextReader


class QwenImageAdapter(QwenVaeAdapter):
    """`QwenImagePipeline` (Qwen Team 2025, arXiv 2508.02324); see `PipelineAdapter`."""

    embedding_names: ClassVar[Sequence[str]] = ("prompt_embeds",)
    text_mask = "prompt_embeds_mask"
    text_parts = ("text_encoder", "tokenizer")
    has_true_cfg = True
    keeps_norm = True
    blocks = (QwenImageTransformerBlock,)

    def encode(self, batch: PromptBatch) -> Conditioning:
        negative = batch.negative_prompts or [""] * len(batch.prompts)
        texts = self._texts(negative, batch.embeddings, "negative_") if batch.guided else []
        return self._conditioning([*texts, *self._texts(batch.prompts, batch.embeddings, "")], batch.guided, batch.size)

    def _texts(self, prompts: list[str], given: Embeddings, side: str) -> list[torch.Tensor]:
        """The embedded texts [N_i, C], or those given for that side.

        Raises:
            ValueError: a given mask has padding before text.
        """
        embeds, mask = self.pipe.encode_prompt(
            prompts,
            self.device,
            prompt_embeds=given.get(f"{side}prompt_embeds"),
            prompt_embeds_mask=given.get(f"{side}{self.text_mask}"),
            max_sequence_length=QWEN_TOKENS,
        )
        if mask is None:
            return list(embeds)
        if (mask[:, 1:] > mask[:, :-1]).any():
            raise ValueError(f"{side}{self.text_mask} has padding before text: put all padding at the end")
        return [row[:length] for row, length in zip(embeds, mask.sum(1).tolist(), strict=True)]

    def text_readers(self) -> list[TextReader]:
        # The pipeline drops the first tokens, which are its own instructions.
        dropped = self.pipe.prompt_template_encode_start_idx
        return self._reader("Qwen2.5-VL", "tokenizer", QWEN_TOKENS + dropped, self._in_chat)

    def _in_chat(self, text: str, tokenizer: Any) -> str:
        return self.pipe.prompt_template_encode.format(text)

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        width = self.denoiser.config.joint_attention_dim
        text = torch.zeros(QWEN_TOKENS, width, dtype=self.dtype, device=self.device)
        return self._conditioning([text] * ((1 + guided) * batch), guided, size)

    def _conditioning(self, texts: Sequence[torch.Tensor], guided: bool, size: tuple[int, int]) -> Conditioning:
        with torch.inference_mode(False):  # the network remembers its positions from its first call
            self.denoiser.pos_embed([(1, *self.grid(size))], max_txt_seq_len=1, device=self.device)
        embeds, lengths = padded(texts, QWEN_TOKENS)
        mask = torch.arange(embeds.shape[1]) < torch.tensor(lengths)[:, None]
        return Conditioning(embeds, {"mask": mask.to(embeds.device)}, 1 + guided, lengths=lengths)

    def inputs(self, x: torch.Tensor, cond: Conditioning) -> dict[str, Any]:
        """Texts up to the longest, with a mask if others are shorter."""
        longest, (rows, columns) = max(cond.lengths), x.shape[-2:]
        mask = None if min(cond.lengths) == longest else (cond.added or {})["mask"][:, :longest]
        return {
            "encoder_hidden_states": cond.embeds[:, :longest],
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, rows // 2, columns // 2)]] * len(cond.embeds),
        }
