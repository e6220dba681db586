"""Z-Image's layers with this package's ops. Importing this file enters them in the tables of `attention` and `surgery`.

diffusers has these layers since 0.36, so nothing imports this file before a Z-Image pipeline is at hand.
"""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import (
    FeedForward,
    ZImageTransformerBlock,
    ZSingleStreamAttnProcessor,
)

from alignprop_fast.models.lean.attention import DISPATCHED, autocasts, head_norms, projected_parts
from alignprop_fast.models.lean.modulation import rms_added, rms_normed
from alignprop_fast.models.lean.surgery import KEPT, LEAN, applies
from alignprop_fast.ops.activation import swiglu
from alignprop_fast.ops.attention import attention_of_parts


class LeanZSingleStreamAttnProcessor(ZSingleStreamAttnProcessor):
    """`diffusers` attention of Z-Image, with rotary positions in fp32, over image and caption tokens in one stream."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        norms = head_norms(attn, with_text=False)
        if norms is None or autocasts(hidden_states) or freqs_cis is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        cos, sin = torch.view_as_real(freqs_cis).unbind(-1)
        (part,) = projected_parts(attn, norms, hidden_states, None)
        # Captions of different lengths: the mask [B, N] is True for the first tokens of a row, the rest is padding.
        lengths = None if attention_mask is None else attention_mask.sum(1, dtype=torch.int32)
        parts, head_dim = [part._replace(angles=(cos, sin))], part.q.shape[2] // attn.heads
        o = attention_of_parts(parts, head_dim, norms.eps, lengths=lengths)
        return attn.to_out[1](attn.to_out[0](o))


class LeanFeedForward(FeedForward):
    """`diffusers` feed-forward part of Z-Image that keeps only its two projections."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if autocasts(x) else self.w2(swiglu(self.w1(x), self.w3(x)))


class LeanZImageTransformerBlock(ZImageTransformerBlock):
    """`diffusers` block of Z-Image, with a norm before and after each branch; some blocks have no modulation."""

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor,
        freqs_cis: torch.Tensor,
        adaln_input: torch.Tensor | None = None,
        noise_mask: torch.Tensor | None = None,
        adaln_noisy: torch.Tensor | None = None,
        adaln_clean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        if noise_mask is not None or not applies(x, *norms):
            return super().forward(x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean)
        scale = gate = scale_mlp = gate_mlp = None
        if self.modulation:
            scale, gate, scale_mlp, gate_mlp = self.adaLN_modulation(adaln_input).unsqueeze(1).chunk(4, dim=2)
            gate, gate_mlp = gate.tanh(), gate_mlp.tanh()
        normed = rms_normed(self.attention_norm1, x, scale)
        branch = self.attention(normed, attention_mask=attn_mask, freqs_cis=freqs_cis)
        x = rms_added(x, branch, self.attention_norm2, gate)
        return rms_added(x, self.feed_forward(rms_normed(self.ffn_norm1, x, scale_mlp)), self.ffn_norm2, gate_mlp)


DISPATCHED[ZSingleStreamAttnProcessor] = LeanZSingleStreamAttnProcessor
KEPT[FeedForward] = {"w1": "geglu", "w3": "geglu", "w2": "out"}
LEAN[FeedForward] = LeanFeedForward
LEAN[ZImageTransformerBlock] = LeanZImageTransformerBlock
