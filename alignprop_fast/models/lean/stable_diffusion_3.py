"""SD3's blocks with this package's ops. Importing this file enters them in the table of `surgery`."""

from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock

from alignprop_fast.models.lean.modulation import Stream, fed_forward, serves
from alignprop_fast.models.lean.surgery import LEAN
from alignprop_fast.ops.norm_modulate import gated_sum


class LeanJointTransformerBlock(JointTransformerBlock):
    """`diffusers` block of SD3 and SD3.5, with one or two attentions; the last block has no text after it."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        image, text = hidden_states, encoder_hidden_states
        norms = [norm for norm in (self.norm2, self.norm2_context) if norm is not None]
        if joint_attention_kwargs or self._chunk_size is not None or not serves(image, *norms):
            return super().forward(image, text, temb, joint_attention_kwargs)
        normed, *others = self.norm1(image, emb=temb)
        gate, *of_forward = (t[:, None] for t in others[:4])
        text_normed, of_text = self._text_normed(text, temb)
        branch, text_branch = self.attn(hidden_states=normed, encoder_hidden_states=text_normed)
        if self.use_dual_attention:
            image = gated_sum(image, gate, branch)
            branch, gate = self.attn2(hidden_states=others[4]), others[5][:, None]
        of_image = Stream(image, branch, (gate, *of_forward), self.norm2, self.ff.net)
        if self.context_pre_only:
            return None, fed_forward(of_image)[0]
        text, image = fed_forward(Stream(text, text_branch, of_text, self.norm2_context, self.ff_context.net), of_image)
        return text, image

    def _text_normed(self, text: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The normed text and its other modulations, of which the last block has none."""
        if self.context_pre_only:
            return self.norm1_context(text, temb), []
        normed, *others = self.norm1_context(text, emb=temb)
        return normed, [t[:, None] for t in others]


LEAN[JointTransformerBlock] = LeanJointTransformerBlock
