"""Chroma's layers with this package's ops. Importing this file enters them in the tables of `surgery`."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_chroma import (
    ChromaAdaLayerNormContinuousPruned,
    ChromaAdaLayerNormZeroPruned,
    ChromaAdaLayerNormZeroSinglePruned,
    ChromaCombinedTimestepTextProjEmbeddings,
    ChromaSingleTransformerBlock,
    ChromaTransformerBlock,
)

from alignprop_fast.models.lean.flux import Rotation, double_stream, single_stream
from alignprop_fast.models.lean.modulation import modulated, serves
from alignprop_fast.models.lean.surgery import KEPT, LEAN

_IMAGE_ROWS = 6  # of a block's modulation [B, 12, C]; the others are the text's


class LeanChromaEmbeddings(ChromaCombinedTimestepTextProjEmbeddings):
    """`diffusers` input of the network that computes all modulation, without a copy from the host."""

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        time, guidance = self.time_proj(timestep), self.guidance_proj(torch.zeros_like(timestep))
        of_picture, of_row = torch.cat([time, guidance], dim=1).to(timestep.dtype), self.mod_proj.to(timestep)
        count, rows = len(of_picture), len(of_row)
        return torch.cat([of_picture[:, None].expand(-1, rows, -1), of_row.expand(count, -1, -1)], dim=-1)


class LeanChromaAdaLayerNormZero(ChromaAdaLayerNormZeroPruned):
    """`diffusers` adaLN-Zero of double-stream blocks, whose modulation is given."""

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.emb is not None or emb is None or not serves(x, self.norm):
            return super().forward(x, timestep, class_labels, hidden_dtype, emb)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = emb.unbind(1)
        return modulated(self.norm, x, scale[:, None], shift[:, None]), gate, shift_mlp, scale_mlp, gate_mlp


class LeanChromaAdaLayerNormZeroSingle(ChromaAdaLayerNormZeroSinglePruned):
    """`diffusers` adaLN-Zero of single-stream blocks, whose modulation is given."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if emb is None or not serves(x, self.norm):
            return super().forward(x, emb)
        shift, scale, gate = emb.unbind(1)
        return modulated(self.norm, x, scale[:, None], shift[:, None]), gate


class LeanChromaAdaLayerNormContinuous(ChromaAdaLayerNormContinuousPruned):
    """`diffusers` adaptive norm at the end, whose modulation is given."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if not serves(x, self.norm):
            return super().forward(x, emb)
        shift, scale = emb.to(x.dtype).unbind(1)
        return modulated(self.norm, x, scale[:, None], shift[:, None])


class LeanChromaTransformerBlock(ChromaTransformerBlock):
    """`diffusers` double-stream block of Chroma."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotation | None = None,
        attention_mask: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text, mask = hidden_states, encoder_hidden_states, attention_mask
        if joint_attention_kwargs or not serves(image, self.norm2, self.norm2_context):
            return super().forward(image, text, temb, image_rotary_emb, mask, joint_attention_kwargs)
        tembs = temb[:, :_IMAGE_ROWS], temb[:, _IMAGE_ROWS:]
        return double_stream(self, image, text, tembs, image_rotary_emb=image_rotary_emb, attention_mask=mask)


class LeanChromaSingleTransformerBlock(ChromaSingleTransformerBlock):
    """`diffusers` single-stream block of Chroma."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotation | None = None,
        attention_mask: torch.Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        x, mask = hidden_states, attention_mask
        if joint_attention_kwargs or not serves(x, self.norm.norm):
            return super().forward(x, temb, image_rotary_emb, mask, joint_attention_kwargs)
        return single_stream(self, x, temb, image_rotary_emb=image_rotary_emb, attention_mask=mask)


LEAN[ChromaCombinedTimestepTextProjEmbeddings] = LeanChromaEmbeddings
LEAN[ChromaAdaLayerNormZeroPruned] = LeanChromaAdaLayerNormZero
LEAN[ChromaAdaLayerNormZeroSinglePruned] = LeanChromaAdaLayerNormZeroSingle
LEAN[ChromaAdaLayerNormContinuousPruned] = LeanChromaAdaLayerNormContinuous
LEAN[ChromaTransformerBlock] = LeanChromaTransformerBlock
LEAN[ChromaSingleTransformerBlock] = LeanChromaSingleTransformerBlock
KEPT[ChromaSingleTransformerBlock] = {"proj_mlp": "geglu", "proj_out": "last"}
