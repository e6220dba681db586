"""FLUX.2's layers with this package's ops. Importing this file enters them in the tables of `attention` and `surgery`.

diffusers has these layers since 0.36, so nothing imports this file before a FLUX.2 pipeline is at hand.
"""

import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2FeedForward,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
)

from alignprop_fast.models.lean.attention import DISPATCHED, autocasts, head_norms, rotary_attention, turned
from alignprop_fast.models.lean.surgery import KEPT
from alignprop_fast.ops.attention import attention_of_parts
from alignprop_fast.ops.qk_norm_rope import Part


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
        return attn.to_out(torch.cat([o, attn.mlp_act_fn(gates)], dim=-1))


DISPATCHED[Flux2AttnProcessor] = LeanFlux2AttnProcessor
DISPATCHED[Flux2ParallelSelfAttnProcessor] = LeanFlux2ParallelSelfAttnProcessor
KEPT[Flux2FeedForward] = {"linear_in": "geglu"}
