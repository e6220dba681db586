"""Z-Image's layers with this package's ops. Importing this file enters them in the tables of `attention` and `surgery`.

diffusers has these layers since 0.36, so nothing imports this file before a Z-Image pipeline is at hand.
"""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_z_image import (
    FeedForward,
    ZImageTransformerBlock,
    ZSingleStreamAttnProcessor,
)

from alignprop_fast.models.lean.attention import DISPATCHED, autocasts, normed, projected
from alignprop_fast.models.lean.surgery import KEPT, LEAN, applies
from alignprop_fast.ops.activation import swiglu
from alignprop_fast.ops.attention import attention, attention_reference
from alignprop_fast.ops.norm_modulate import norm_modulate


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
        if autocasts(hidden_states) or freqs_cis is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        linears = projected(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in linears)
        q, k = (_rotated(normed(x, norm), freqs_cis) for x, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if attention_mask is None:
            o = attention(q, k, v)
        else:  # captions of different lengths: True where a key [B, N] is no padding
            o = attention_reference(q, k, v, mask=attention_mask[:, None, None, :])
        return attn.to_out[1](attn.to_out[0](o.transpose(1, 2).flatten(2)))


def _rotated(x_BNHD: torch.Tensor, angles_BND: torch.Tensor) -> torch.Tensor:
    """x turned by angles, complex numbers [B, N, D / 2] that multiply pairs of neighbouring channels, in fp32."""
    pairs = torch.view_as_complex(x_BNHD.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles_BND.unsqueeze(2)).flatten(3).type_as(x_BNHD)


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
        normed = _normed(self.attention_norm1, x, scale)
        branch = self.attention(normed, attention_mask=attn_mask, freqs_cis=freqs_cis)
        x = _added(x, branch, self.attention_norm2, gate)
        return _added(x, self.feed_forward(_normed(self.ffn_norm1, x, scale_mlp)), self.ffn_norm2, gate_mlp)


def _normed(norm: RMSNorm, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """norm(x) * (1 + scale)."""
    return norm_modulate(x, scale, None, norm.weight, norm.eps, rms=True)


def _added(x: torch.Tensor, branch: torch.Tensor, norm: RMSNorm, gate: torch.Tensor | None) -> torch.Tensor:
    """x + gate * norm(branch)."""
    return norm_modulate(branch, gate, x, norm.weight, norm.eps, one=0.0, rms=True)


DISPATCHED[ZSingleStreamAttnProcessor] = LeanZSingleStreamAttnProcessor
KEPT[FeedForward] = {"w1": "geglu", "w3": "geglu", "w2": "out"}
LEAN[FeedForward] = LeanFeedForward
LEAN[ZImageTransformerBlock] = LeanZImageTransformerBlock
