"""Lumina 2's layers with this package's ops. Importing this file enters them in the tables of `attention`, `surgery`.

diffusers has these layers since 0.33, so nothing imports this file before a Lumina 2 pipeline is at hand.
"""

import torch
from diffusers.models.attention import LuminaFeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0, Lumina2TransformerBlock

from alignprop_fast.models.lean.attention import DISPATCHED, autocasts, head_norms, projected_parts
from alignprop_fast.models.lean.modulation import rms_added, rms_normed
from alignprop_fast.models.lean.surgery import KEPT, LEAN, applies
from alignprop_fast.ops.activation import swiglu
from alignprop_fast.ops.attention import attention_of_parts


class LeanLumina2AttnProcessor(Lumina2AttnProcessor2_0):
    """`diffusers` attention of Lumina 2: rotary positions, and several heads of q that share those of k and v."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> torch.Tensor:
        x, norms = hidden_states, head_norms(attn, with_text=False)
        if norms is None or autocasts(x) or image_rotary_emb is None or base_sequence_length is not None:
            return super().__call__(
                attn, x, encoder_hidden_states, attention_mask, image_rotary_emb, base_sequence_length
            )
        cos, sin = torch.view_as_real(image_rotary_emb).unbind(-1)
        (part,) = projected_parts(attn, norms, x, None)
        # Texts of different lengths: the mask [B, N] is True for the first tokens of a row, the rest is padding.
        lengths = None if attention_mask is None else attention_mask.sum(1, dtype=torch.int32)
        parts, head_dim = [part._replace(angles=(cos, sin))], part.q.shape[2] // attn.heads
        o = attention_of_parts(parts, head_dim, norms.eps, lengths=lengths)
        return attn.to_out[1](attn.to_out[0](o))


class LeanLuminaFeedForward(LuminaFeedForward):
    """`diffusers` feed-forward part of Lumina 2 that keeps only its two projections."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if autocasts(x) else self.linear_2(swiglu(self.linear_1(x), self.linear_3(x)))


class LeanLumina2TransformerBlock(Lumina2TransformerBlock):
    """`diffusers` block of Lumina 2, with a norm before and after each branch; some blocks have no modulation."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_rotary_emb: torch.Tensor,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x, first = hidden_states, self.norm1.norm if self.modulation else self.norm1
        if not applies(x, first, self.norm2, self.ffn_norm1, self.ffn_norm2):
            return super().forward(x, attention_mask, image_rotary_emb, temb)
        scale = gate = scale_mlp = gate_mlp = None
        if self.modulation:
            modulation = self.norm1.linear(self.norm1.silu(temb)).unsqueeze(1)
            scale, gate, scale_mlp, gate_mlp = modulation.chunk(4, dim=2)
            gate, gate_mlp = gate.tanh(), gate_mlp.tanh()
        normed = rms_normed(first, x, scale)
        branch = self.attn(normed, normed, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)
        x = rms_added(x, branch, self.norm2, gate)
        return rms_added(x, self.feed_forward(rms_normed(self.ffn_norm1, x, scale_mlp)), self.ffn_norm2, gate_mlp)


DISPATCHED[Lumina2AttnProcessor2_0] = LeanLumina2AttnProcessor
KEPT[LuminaFeedForward] = {"linear_1": "geglu", "linear_3": "geglu", "linear_2": "out"}
LEAN[LuminaFeedForward] = LeanLuminaFeedForward
LEAN[Lumina2TransformerBlock] = LeanLumina2TransformerBlock
