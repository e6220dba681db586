"""Z-Image's layers with this package's ops. Importing this file enters them in the tables of `attention` and `surgery`.

diffusers has these layers since 0.36, so nothing imports this file before a Z-Image pipeline is at hand.
"""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import FeedForward, ZSingleStreamAttnProcessor

from alignprop_fast.models.lean.attention import DISPATCHED, autocasts, head_norms, projected_parts
from alignprop_fast.models.lean.surgery import KEPT
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


DISPATCHED[ZSingleStreamAttnProcessor] = LeanZSingleStreamAttnProcessor
KEPT[FeedForward] = {"w1": "geglu", "w3": "geglu", "w2": "out"}
