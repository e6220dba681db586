"""Qwen-Image's layers with this package's ops. Importing this file enters them in the tables of `attention`.

diffusers has these layers since 0.35, so nothing imports this file before a Qwen-Image pipeline is at hand.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

from alignprop_fast.models.lean.attention import DISPATCHED, attended, autocasts, image_heads, text_heads, turned_pairs


class LeanQwenDoubleStreamAttnProcessor(QwenDoubleStreamAttnProcessor2_0):
    """`diffusers` attention of Qwen-Image: text tokens, of which some may be padding, then image tokens."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        text, image, mask = encoder_hidden_states, hidden_states, encoder_hidden_states_mask
        if text is None or attention_mask is not None or image_rotary_emb is None or autocasts(image):
            return super().__call__(attn, image, text, mask, attention_mask, image_rotary_emb)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1)
        parts = (text_heads(attn, text), image_rotary_emb[1]), (image_heads(attn, image), image_rotary_emb[0])
        # Text and image are turned apart: the angles of both in one tensor would be kept once for each block.
        turned = [(turned_pairs(q, angles[None]), turned_pairs(k, angles[None]), v) for (q, k, v), angles in parts]
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(*turned, strict=True))
        o = attended(q, k, v, mask)
        text, image = o.split([text.shape[1], image.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


DISPATCHED[QwenDoubleStreamAttnProcessor2_0] = LeanQwenDoubleStreamAttnProcessor
