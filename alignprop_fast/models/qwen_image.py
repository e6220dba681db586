"""Qwen-Image as a chain: flow matching, texts of any length, guidance that keeps the norm of each prediction."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

import alignprop_fast.models.lean.qwen_image  # noqa: F401  # enters this model's layers in the tables of ops
from alignprop_fast.models.conditioning import Conditioning, Embeddings
from alignprop_fast.models.lean.qwen_image_network import run_network
from alignprop_fast.models.qwen_chat import QWEN_TOKENS
from alignprop_fast.models.qwen_family import QwenFamilyAdapter
from alignprop_fast.prompts.limits import TextReader


class QwenImageAdapter(QwenFamilyAdapter):
    """`QwenImagePipeline` (Qwen Team 2025, arXiv 2508.02324); see `PipelineAdapter`."""

    has_true_cfg = True
    keeps_norm = "patches"
    blocks = (QwenImageTransformerBlock,)

    def _texts(self, prompts: list[str], given: Embeddings, side: str) -> list[torch.Tensor]:
        """As in the family. Raises ValueError if a mask has padding before text, which would move its positions."""
        mask = given.get(f"{side}{self.text_mask}")
        if isinstance(mask, torch.Tensor) and (mask[:, 1:] > mask[:, :-1]).any():
            raise ValueError(f"{side}{self.text_mask} has padding before text: put all padding at the end")
        return super()._texts(prompts, given, side)

    def text_readers(self) -> list[TextReader]:
        # The pipeline drops the first tokens, which are its own instructions.
        dropped = self.pipe.prompt_template_encode_start_idx
        return self._reader("Qwen2.5-VL", "tokenizer", QWEN_TOKENS + dropped, self._in_chat)

    def _in_chat(self, text: str, tokenizer: Any) -> str:
        return self.pipe.prompt_template_encode.format(text)

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        return self._blank((self.denoiser.config.joint_attention_dim,), batch, guided, size)

    def _conditioning(self, texts: Sequence[torch.Tensor], guided: bool, size: tuple[int, int]) -> Conditioning:
        # The network remembers the positions from its first call, which must not be in inference mode.
        with torch.inference_mode(False):
            self.denoiser.pos_embed([(1, *self.grid(size))], max_txt_seq_len=1, device=self.device)
        return super()._conditioning(texts, guided, size)

    def inputs(self, x: torch.Tensor, cond: Conditioning) -> dict[str, Any]:
        text, mask = self._text_and_mask(cond)
        return {"text": text, "mask": mask, "grid": (x.shape[2] // 2, x.shape[3] // 2)}

    def run(self, **inputs: Any) -> torch.Tensor:
        return run_network(self.denoiser, **inputs)
