"""Krea 2's layers with this package's ops. Importing this file enters them in the tables of `attention` and `surgery`.

diffusers has these layers since 0.40, so nothing imports this file before a Krea 2 pipeline is at hand.
"""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_krea2 import Krea2Attention, Krea2AttnProcessor, Krea2SwiGLU

from alignprop_fast.models.lean.attention import DISPATCHED, autocasts, projected
from alignprop_fast.models.lean.surgery import KEPT, LEAN
from alignprop_fast.ops.activation import swiglu
from alignprop_fast.ops.attention import attention


class LeanKrea2AttnProcessor(Krea2AttnProcessor):
    """`diffusers` attention of Krea 2: several heads of q share those of k and v, and the result has a gate."""

    def __call__(
        self,
        attn: Krea2Attention,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if autocasts(hidden_states):
            return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
        linears = projected(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in linears)
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        k, v = (x.repeat_interleave(attn.num_heads // attn.num_kv_heads, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # The mask is for texts of different lengths, whose padding lies between text and image.
        o = attention(q, k, v) if attention_mask is None else F.scaled_dot_product_attention(q, k, v, attention_mask)
        return attn.to_out[0](o.transpose(1, 2).flatten(2) * torch.sigmoid(attn.to_gate(hidden_states)))


class LeanKrea2SwiGLU(Krea2SwiGLU):
    """`diffusers` feed-forward part of Krea 2 that keeps only its two projections."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states
        return super().forward(x) if autocasts(x) else self.down(swiglu(self.gate(x), self.up(x)))


DISPATCHED[Krea2AttnProcessor] = LeanKrea2AttnProcessor
LEAN[Krea2SwiGLU] = LeanKrea2SwiGLU
KEPT[Krea2SwiGLU] = {"gate": "geglu", "up": "geglu", "down": "out"}
