"""FLUX.1's blocks with this package's ops. Importing this file enters them in the table of `surgery`."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

from alignprop_fast.models.lean.modulation import Stream, clipped, fed_forward, serves
from alignprop_fast.models.lean.surgery import LEAN
from alignprop_fast.ops.activation import gelu_tanh
from alignprop_fast.ops.norm_modulate import gated_sum

Rotation = tuple[torch.Tensor, torch.Tensor]


def double_stream(
    block: Any, image: torch.Tensor, text: torch.Tensor, tembs: tuple[torch.Tensor, torch.Tensor], **attention: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(text, image) after a block of FLUX.1 or Chroma. tembs: what the norms of image and of text take."""
    image_normed, *of_image = block.norm1(image, emb=tembs[0])
    text_normed, *of_text = block.norm1_context(text, emb=tembs[1])
    branch, text_branch = block.attn(hidden_states=image_normed, encoder_hidden_states=text_normed, **attention)
    text, image = fed_forward(
        Stream(text, text_branch, [t[:, None] for t in of_text], block.norm2_context, block.ff_context.net),
        Stream(image, branch, [t[:, None] for t in of_image], block.norm2, block.ff.net),
    )
    return clipped(text), image


def single_stream(block: Any, x: torch.Tensor, temb: torch.Tensor, **attention: Any) -> torch.Tensor:
    """Text and image tokens x after a block of FLUX.1 or Chroma."""
    normed, gate = block.norm(x, emb=temb)
    projection = block.proj_mlp(normed)
    o = block.attn(hidden_states=normed, **attention)
    return clipped(gated_sum(x, gate[:, None], block.proj_out(gelu_tanh(projection, beside=o))))


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
        return double_stream(self, image, text, (temb, temb), image_rotary_emb=image_rotary_emb)


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
        x = single_stream(self, torch.cat([text, image], dim=1), temb, image_rotary_emb=image_rotary_emb)
        text, image = x.split([text.shape[1], image.shape[1]], dim=1)
        return text, image


LEAN[FluxTransformerBlock] = LeanFluxTransformerBlock
LEAN[FluxSingleTransformerBlock] = LeanFluxSingleTransformerBlock
