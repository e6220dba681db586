"""Z-Image's layers with this package's ops. Importing this file enters them in the tables of `attention` and `surgery`.

diffusers has these layers since 0.36, so nothing imports this file before a Z-Image pipeline is at hand.
"""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import FeedForward, ZSingleStreamAttnProcessor

from alignprop_fast.models.lean.attention import DISPATCHED, attended, autocasts, image_heads, turned_pairs
from alignprop_fast.models.lean.surgery import KEPT


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
        q, k, v = image_heads(attn, hidden_states)
        q, k = (turned_pairs(x, freqs_cis) for x in (q, k))
        # The mask is for captions of different lengths: True where a key [B, N] is no padding.
        return attn.to_out[1](attn.to_out[0](attended(q, k, v, attention_mask)))


DISPATCHED[ZSingleStreamAttnProcessor] = LeanZSingleStreamAttnProcessor
KEPT[FeedForward] = {"w1": "geglu", "w3": "geglu", "w2": "out"}
