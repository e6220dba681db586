"""FLUX.2's layers with this package's ops. Importing this file enters them in the tables of `attention` and `surgery`.

diffusers has these layers since 0.36, so nothing imports this file before a FLUX.2 pipeline is at hand.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2FeedForward,
    Flux2Modulation,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    Flux2SingleTransformerBlock,
    Flux2SwiGLU,
    Flux2TransformerBlock,
)

from alignprop_fast.models.lean.attention import DISPATCHED, autocasts, head_norms, rotary_attention, turned
from alignprop_fast.models.lean.modulation import Stream, clipped, fed_forward, modulated, serves
from alignprop_fast.models.lean.surgery import KEPT, LEAN
from alignprop_fast.ops.activation import swiglu
from alignprop_fast.ops.attention import attention_of_parts
from alignprop_fast.ops.norm_modulate import gated_sum
from alignprop_fast.ops.qk_norm_rope import Part

Rotation = tuple[torch.Tensor, torch.Tensor]


class LeanFlux2AttnProcessor(Flux2AttnProcessor):
    """`diffusers` attention of FLUX.2's double-stream blocks: text tokens, then image tokens."""

    def __call__(
        self,
        attn: Flux2Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        text, image = encoder_hidden_states, hidden_states
        norms = head_norms(attn, text is not None)
        if text is None or norms is None or attention_mask is not None or autocasts(image) or attn.fused_projections:
            return super().__call__(attn, image, text, attention_mask, image_rotary_emb)
        o = rotary_attention(attn, norms, image, text, image_rotary_emb)
        text, image = o.split([text.shape[1], image.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


class LeanFlux2ParallelSelfAttnProcessor(Flux2ParallelSelfAttnProcessor):
    """`diffusers` attention of FLUX.2's single-stream blocks, projected together with their feed-forward part."""

    def __call__(
        self,
        attn: Flux2ParallelSelfAttention,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        norms = head_norms(attn, with_text=False)
        if norms is None or attention_mask is not None or autocasts(hidden_states):
            return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
        projections = attn.to_qkv_mlp_proj(hidden_states)
        qkv, gates = projections.split([3 * attn.inner_dim, projections.shape[-1] - 3 * attn.inner_dim], dim=-1)
        q, k, v = qkv.chunk(3, dim=-1)
        parts = turned([Part(q, k, v, norms.image)], image_rotary_emb)
        o = attention_of_parts(parts, attn.inner_dim // attn.heads, norms.eps)
        return attn.to_out(swiglu(gates, beside=o))


class LeanFlux2SwiGLU(Flux2SwiGLU):
    """`diffusers` SwiGLU that keeps only its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if autocasts(x) else swiglu(x)


class LeanFlux2TransformerBlock(Flux2TransformerBlock):
    """`diffusers` double-stream block of FLUX.2."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb_mod_img: torch.Tensor,
        temb_mod_txt: torch.Tensor,
        image_rotary_emb: Rotation | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = hidden_states, encoder_hidden_states
        norms = (self.norm1, self.norm1_context, self.norm2, self.norm2_context)
        if joint_attention_kwargs or not serves(image, *norms):
            return super().forward(image, text, temb_mod_img, temb_mod_txt, image_rotary_emb, joint_attention_kwargs)
        (shift, scale, gate), image_forward = Flux2Modulation.split(temb_mod_img, 2)
        (text_shift, text_scale, text_gate), text_forward = Flux2Modulation.split(temb_mod_txt, 2)
        branch, text_branch = self.attn(
            hidden_states=modulated(self.norm1, image, scale, shift),
            encoder_hidden_states=modulated(self.norm1_context, text, text_scale, text_shift),
            image_rotary_emb=image_rotary_emb,
        )
        layers, text_layers = ((ff.linear_in, ff.act_fn, ff.linear_out) for ff in (self.ff, self.ff_context))
        text, image = fed_forward(
            Stream(text, text_branch, (text_gate, *text_forward), self.norm2_context, text_layers),
            Stream(image, branch, (gate, *image_forward), self.norm2, layers),
        )
        return clipped(text), image


class LeanFlux2SingleTransformerBlock(Flux2SingleTransformerBlock):
    """`diffusers` single-stream block of FLUX.2, over text and image tokens in one tensor."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        temb_mod: torch.Tensor,
        image_rotary_emb: Rotation | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        **joining: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x, text = hidden_states, encoder_hidden_states
        if text is not None or joint_attention_kwargs or joining or not serves(x, self.norm):
            return super().forward(x, text, temb_mod, image_rotary_emb, joint_attention_kwargs, **joining)
        shift, scale, gate = Flux2Modulation.split(temb_mod, 1)[0]
        branch = self.attn(hidden_states=modulated(self.norm, x, scale, shift), image_rotary_emb=image_rotary_emb)
        return clipped(gated_sum(x, gate, branch))


DISPATCHED[Flux2AttnProcessor] = LeanFlux2AttnProcessor
DISPATCHED[Flux2ParallelSelfAttnProcessor] = LeanFlux2ParallelSelfAttnProcessor
KEPT[Flux2FeedForward] = {"linear_in": "geglu"}
LEAN[Flux2SwiGLU] = LeanFlux2SwiGLU
LEAN[Flux2TransformerBlock] = LeanFlux2TransformerBlock
LEAN[Flux2SingleTransformerBlock] = LeanFlux2SingleTransformerBlock
