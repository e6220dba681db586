"""FLUX.1's blocks with this package's ops. Importing this file enters them in the table of `surgery`."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

from alignprop_fast.models.lean.modulation import Stream, clipped, fed_forward, serves
from alignprop_fast.models.lean.surgery import LEAN
from alignprop_fast.ops.activation import gelu_tanh
from alignprop_fast.ops.norm_modulate import gated_sum

Rotation = tuple[torch.Tensor, torch.Tensor]


class LeanFluxTransformerBlock(FluxTransformerBlock):
    """`diffusers` double-stream block of FLUX.1."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotation | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = hidden_states, encoder_hidden_states
        if joint_attention_kwargs or not serves(image, self.norm2, self.norm2_context):
            return super().forward(image, text, temb, image_rotary_emb, joint_attention_kwargs)
        image_normed, *of_image = self.norm1(image, emb=temb)
        text_normed, *of_text = self.norm1_context(text, emb=temb)
        branch, text_branch = self.attn(
            hidden_states=image_normed, encoder_hidden_states=text_normed, image_rotary_emb=image_rotary_emb
        )
        text, image = fed_forward(
            Stream(text, text_branch, [t[:, None] for t in of_text], self.norm2_context, self.ff_context.net),
            Stream(image, branch, [t[:, None] for t in of_image], self.norm2, self.ff.net),
        )
        return clipped(text), image


class LeanFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """`diffusers` single-stream block of FLUX.1."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotation | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = hidden_states, encoder_hidden_states
        if joint_attention_kwargs or not serves(image, self.norm.norm):
            return super().forward(image, text, temb, image_rotary_emb, joint_attention_kwargs)
        x = torch.cat([text, image], dim=1)
        normed, gate = self.norm(x, emb=temb)
        projection = self.proj_mlp(normed)
        o = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        x = clipped(gated_sum(x, gate[:, None], self.proj_out(gelu_tanh(projection, beside=o))))
        text, image = x.split([text.shape[1], image.shape[1]], dim=1)
        return text, image


LEAN[FluxTransformerBlock] = LeanFluxTransformerBlock
LEAN[FluxSingleTransformerBlock] = LeanFluxSingleTransformerBlock
