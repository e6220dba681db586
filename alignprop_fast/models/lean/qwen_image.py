"""Qwen-Image's layers with this package's ops.

Importing this file enters them in the tables of `attention` and `surgery`. diffusers has these layers since 0.35, so
nothing imports this file before a Qwen-Image pipeline is at hand.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformerBlock,
)

from alignprop_fast.models.lean.attention import DISPATCHED, autocasts, head_norms, projected_parts
from alignprop_fast.models.lean.modulation import Stream, clipped, fed_forward, modulated, serves
from alignprop_fast.models.lean.surgery import LEAN
from alignprop_fast.ops.attention import attention_of_parts

Rotation = tuple[torch.Tensor, torch.Tensor]


class LeanQwenDoubleStreamAttnProcessor(QwenDoubleStreamAttnProcessor2_0):
    """`diffusers` attention of Qwen-Image: image tokens, then text tokens, of which the last may be padding."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text, mask = hidden_states, encoder_hidden_states, encoder_hidden_states_mask
        norms = head_norms(attn, with_text=True)
        if text is None or image_rotary_emb is None or attention_mask is not None or norms is None or autocasts(image):
            return super().__call__(attn, image, text, mask, attention_mask, image_rotary_emb)
        parts = [
            part._replace(angles=_cos_and_sin(angles))
            for part, angles in zip(projected_parts(attn, norms, image, text), image_rotary_emb, strict=True)
        ]
        lengths = None if mask is None else image.shape[1] + mask.sum(1, dtype=torch.int32)
        o = attention_of_parts(parts, attn.inner_dim // attn.heads, norms.eps, lengths=lengths)
        image, text = o.split([image.shape[1], text.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def _cos_and_sin(angles_NP: torch.Tensor) -> Rotation:
    """[1, N, P] each, of complex numbers."""
    numbers = angles_NP[None]
    return numbers.real, numbers.imag


class LeanQwenImageTransformerBlock(QwenImageTransformerBlock):
    """`diffusers` block of Qwen-Image."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None,
        temb: torch.Tensor,
        image_rotary_emb: Rotation | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text, mask = hidden_states, encoder_hidden_states, encoder_hidden_states_mask
        norms = (self.img_norm1, self.txt_norm1, self.img_norm2, self.txt_norm2)
        if joint_attention_kwargs or modulate_index is not None or not serves(image, *norms):
            others = temb, image_rotary_emb, joint_attention_kwargs, modulate_index
            return super().forward(image, text, mask, *others)
        shift, scale, *of_image = self.img_mod(temb)[:, None].chunk(6, dim=-1)
        text_shift, text_scale, *of_text = self.txt_mod(temb)[:, None].chunk(6, dim=-1)
        branch, text_branch = self.attn(
            hidden_states=modulated(self.img_norm1, image, scale, shift),
            encoder_hidden_states=modulated(self.txt_norm1, text, text_scale, text_shift),
            encoder_hidden_states_mask=mask,
            image_rotary_emb=image_rotary_emb,
        )
        text, image = fed_forward(
            Stream(text, text_branch, of_text, self.txt_norm2, self.txt_mlp.net),
            Stream(image, branch, of_image, self.img_norm2, self.img_mlp.net),
        )
        return clipped(text), clipped(image)


DISPATCHED[QwenDoubleStreamAttnProcessor2_0] = LeanQwenDoubleStreamAttnProcessor
LEAN[QwenImageTransformerBlock] = LeanQwenImageTransformerBlock
