"""Krea 2's layers with this package's ops. Importing this file enters them in the tables of `attention` and `surgery`.

diffusers has these layers since 0.40, so nothing imports this file before a Krea 2 pipeline is at hand.
"""

import torch
from diffusers.models.transformers.transformer_krea2 import (
    Krea2Attention,
    Krea2AttnProcessor,
    Krea2FinalLayer,
    Krea2RMSNorm,
    Krea2SwiGLU,
    Krea2TextFusionBlock,
    Krea2TransformerBlock,
)

from alignprop_fast.models.lean.attention import DISPATCHED, autocasts, projected, turned
from alignprop_fast.models.lean.surgery import KEPT, LEAN, applies
from alignprop_fast.ops.activation import swiglu
from alignprop_fast.ops.attention import attention_of_parts
from alignprop_fast.ops.attention_plain import is_key
from alignprop_fast.ops.norm_modulate import gated_sum, norm_modulate
from alignprop_fast.ops.qk_norm_rope import Part

Tensor = torch.Tensor


class LeanKrea2AttnProcessor(Krea2AttnProcessor):
    """`diffusers` attention of Krea 2: several heads of q share those of k and v, and the result has a gate.

    Padding comes as `key_padding` gives it. A mask is diffusers' own, whose padding lies between text and image.
    """

    def __call__(
        self,
        attn: Krea2Attention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        x, lengths = hidden_states, attention_mask if _is_lengths(attention_mask) else None
        mask = attention_mask if lengths is None else is_key(lengths, x.shape[1])
        if (mask is not None and lengths is None) or not applies(x, attn.norm_q, attn.norm_k):
            return super().__call__(attn, x, mask, image_rotary_emb)
        q, k, v = projected(x, attn.to_q, attn.to_k, attn.to_v)
        part = Part(q, k, v, (_weight(attn.norm_q), _weight(attn.norm_k)))
        o = attention_of_parts(turned([part], image_rotary_emb), attn.head_dim, attn.norm_q.eps, lengths=lengths)
        return attn.to_out[0](o * torch.sigmoid(attn.to_gate(x)))


def _is_lengths(mask: Tensor | None) -> bool:
    return mask is not None and mask.ndim == 1


def key_padding(attn: Krea2Attention, lengths_B: Tensor, keys: int) -> Tensor:
    """Padding behind the first keys of each row, in the form that the attention's processor takes.

    Lengths [B] for this package's processor, a mask [B, 1, 1, N] for that of diffusers.
    """
    return lengths_B if isinstance(attn.processor, LeanKrea2AttnProcessor) else is_key(lengths_B, keys)


class LeanKrea2RMSNorm(Krea2RMSNorm):
    """`diffusers` RMSNorm of Krea 2, which scales by 1 + weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return normed(self, hidden_states) if applies(hidden_states, self) else super().forward(hidden_states)


def _weight(norm: Krea2RMSNorm) -> Tensor:
    return norm.weight + 1


def normed(norm: Krea2RMSNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """norm(x) * (1 + scale) + shift."""
    return norm_modulate(x, scale, shift, _weight(norm), norm.eps, rms=True)


class LeanKrea2SwiGLU(Krea2SwiGLU):
    """`diffusers` feed-forward part of Krea 2 that keeps only its two projections."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        return super().forward(x) if autocasts(x) else self.down(swiglu(self.gate(x), self.up(x)))


class LeanKrea2TransformerBlock(Krea2TransformerBlock):
    """`diffusers` block of Krea 2."""

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        x, norm = hidden_states, self.norm2
        if not applies(x, self.norm1, norm):
            return super().forward(x, temb, image_rotary_emb, attention_mask)
        modulation = temb.unflatten(-1, (6, -1)) + self.scale_shift_table
        scale, shift, gate, scale_mlp, shift_mlp, gate_mlp = modulation.unbind(-2)
        branch = self.attn(normed(self.norm1, x, scale, shift), attention_mask, image_rotary_emb)
        y, x = norm_modulate(x, scale_mlp, shift_mlp, _weight(norm), norm.eps, rms=True, branch=branch, gate=gate)
        return gated_sum(x, gate_mlp, self.ff(y))


class LeanKrea2TextFusionBlock(Krea2TextFusionBlock):
    """`diffusers` block of Krea 2 over the layers of a token, or over the tokens of a text."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x, norm = hidden_states, self.norm2
        if not applies(x, self.norm1, norm):
            return super().forward(x, attention_mask)
        branch = self.attn(normed(self.norm1, x), attention_mask)
        y, x = norm_modulate(x, None, None, _weight(norm), norm.eps, rms=True, branch=branch)
        return x + self.ff(y)


class LeanKrea2FinalLayer(Krea2FinalLayer):
    """`diffusers` adaptive norm and product at the end of Krea 2."""

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        if not applies(hidden_states, self.norm):
            return super().forward(hidden_states, temb)
        scale, shift = (temb + self.scale_shift_table).chunk(2, dim=1)
        return self.linear(normed(self.norm, hidden_states, scale, shift))


DISPATCHED[Krea2AttnProcessor] = LeanKrea2AttnProcessor
KEPT[Krea2SwiGLU] = {"gate": "geglu", "up": "geglu", "down": "last"}
LEAN[Krea2RMSNorm] = LeanKrea2RMSNorm
LEAN[Krea2SwiGLU] = LeanKrea2SwiGLU
LEAN[Krea2TransformerBlock] = LeanKrea2TransformerBlock
LEAN[Krea2TextFusionBlock] = LeanKrea2TextFusionBlock
LEAN[Krea2FinalLayer] = LeanKrea2FinalLayer
