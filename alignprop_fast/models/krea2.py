"""Krea 2 as a chain: flow matching, one stream of text and image, the text a stack of a language model's layers."""

from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_krea2 import Krea2TextFusionBlock, Krea2TransformerBlock

from alignprop_fast.models.conditioning import Conditioning
from alignprop_fast.models.lean.krea2_network import run_network
from alignprop_fast.models.qwen_chat import QWEN_TOKENS
from alignprop_fast.models.qwen_family import QwenFamilyAdapter
from alignprop_fast.prompts.limits import TextReader

_DISTILLED_SHIFT = 1.15  # of every size


class Krea2Adapter(QwenFamilyAdapter):
    """`Krea2Pipeline` (Krea 2026), distilled or not; see `PipelineAdapter`.

    The pipeline pads each text to 512 tokens before the chat's last marks. Text tokens have no positions, so padding is
    left out here.
    """

    unguided_scale = 0.0
    blocks = (Krea2TextFusionBlock, Krea2TransformerBlock)

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, size: tuple[int, int]) -> None:
        if not self.pipe.config.is_distilled:
            return super()._set_timesteps(scheduler, num_inference_steps, size)
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=_DISTILLED_SHIFT)

    def text_readers(self) -> list[TextReader]:
        # The pipeline drops the first tokens, which are its own instructions, and adds the chat's last marks.
        pipe = self.pipe
        read = QWEN_TOKENS + pipe.prompt_template_encode_start_idx - pipe.prompt_template_encode_num_suffix_tokens
        return self._reader("Qwen3-VL", "tokenizer", read, self._in_chat)

    def _in_chat(self, text: str, tokenizer: Any) -> str:
        return self.pipe.prompt_template_encode_prefix + text

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        config = self.denoiser.config
        return self._blank((config.num_text_layers, config.text_hidden_dim), batch, guided, size)

    def inputs(self, x: torch.Tensor, cond: Conditioning) -> dict[str, Any]:
        text, mask = self._text_and_mask(cond)
        lengths = None if mask is None else mask.sum(1, dtype=torch.int32)
        return {"text": text, "lengths": lengths, "grid": (x.shape[2] // 2, x.shape[3] // 2)}

    def run(self, **inputs: Any) -> torch.Tensor:
        return run_network(self.denoiser, **inputs)
