"""Z-Image's layers with this package's ops. Importing this file enters them in the tables of `attention` and `surgery`.

diffusers has these layers since 0.36, so nothing imports this file before a Z-Image pipeline is at hand.
"""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import FeedForward, ZSingleStreamAttnProcessor

from alignprop_fast.models.lean.attention import DISPATCHED, autocasts, normed, projected
from alignprop_fast.models.lean.surgery import KEPT
from alignprop_fast.ops.attention import attention, attention_reference


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


DISPATCHED[ZSingleStreamAttnProcessor] = LeanZSingleStreamAttnProcessor
KEPT[FeedForward] = {"w1": "geglu", "w3": "geglu", "w2": "out"}
