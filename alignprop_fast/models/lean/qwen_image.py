"""Qwen-Image's layers with this package's ops. Importing this file enters them in the tables of `attention`.

diffusers has these layers since 0.35, so nothing imports this file before a Qwen-Image pipeline is at hand.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

from alignprop_fast.models.lean.attention import DISPATCHED, autocasts, head_norms, projected_parts
from alignprop_fast.ops.attention import attention_of_parts


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
        norms = head_norms(attn, text is not None)
        if text is None or norms is None or image_rotary_emb is None or autocasts(image):
            return super().__call__(attn, image, text, mask, attention_mask, image_rotary_emb)
        # The text comes last, so that its padding is the end of the sequence. Attention heeds no order of tokens.
        parts = projected_parts(attn, norms, image, text)
        lengths = None if mask is None else image.shape[1] + mask.sum(1, dtype=torch.int32)
        angles = (torch.view_as_real(turn)[None] for turn in image_rotary_emb)
        turned = [part._replace(angles=(t[..., 0], t[..., 1])) for part, t in zip(parts, angles, strict=True)]
        o = attention_of_parts(turned, parts[0].q.shape[2] // attn.heads, norms.eps, lengths=lengths)
        image, text = o.split([image.shape[1], text.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


DISPATCHED[QwenDoubleStreamAttnProcessor2_0] = LeanQwenDoubleStreamAttnProcessor
