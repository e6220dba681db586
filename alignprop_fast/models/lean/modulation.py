"""Adaptive norms of diffusion transformers (adaLN) as one op: norm, scale and shift, and the gated sum before them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    RMSNorm,
    SD35AdaLayerNormZeroX,
)
from torch import nn

from alignprop_fast.models.lean.surgery import LEAN, LeanLayerNorm, applies
from alignprop_fast.ops.norm_modulate import gated_sum, norm_modulate


def serves(x: torch.Tensor, *norms: nn.Module) -> bool:
    """Whether the op takes the place of these norms: layer norms over the last dimension, frozen and without a bias."""
    plain = all(
        isinstance(norm, LeanLayerNorm) and len(norm.normalized_shape) == 1 and norm.bias is None for norm in norms
    )
    return plain and applies(x, *norms)


def modulated(norm: nn.LayerNorm, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """norm(x) * (1 + scale) + shift; x: [B, N, C], scale and shift: [B, 1, C]."""
    return norm_modulate(x, scale, shift, norm.weight, norm.eps)


def rms_normed(norm: RMSNorm, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """norm(x) * (1 + scale)."""
    return norm_modulate(x, scale, None, norm.weight, norm.eps, rms=True)


def rms_added(x: torch.Tensor, branch: torch.Tensor, norm: RMSNorm, gate: torch.Tensor | None) -> torch.Tensor:
    """x + gate * norm(branch)."""
    return norm_modulate(branch, gate, x, norm.weight, norm.eps, one=0.0, rms=True)


class Stream(NamedTuple):
    """Tokens in the second half of a block: x, and the attention's branch that is added to them; [B, N, C].

    modulation: the branch's gate, the norm's shift and scale, and the gate of the feed-forward part, [B, 1, C] each.
    layers: of the feed-forward part, in their order; the last one is a product.
    """

    x: torch.Tensor
    branch: torch.Tensor
    modulation: Sequence[torch.Tensor]
    norm: nn.LayerNorm
    layers: Sequence[nn.Module]

    def begun(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x + gate * branch, and the feed-forward part of its norm without the last product."""
        gate, shift, scale, _ = self.modulation
        weight, eps = self.norm.weight, self.norm.eps
        y, x = norm_modulate(self.x, scale, shift, weight, eps, branch=self.branch, gate=gate)
        for layer in self.layers[:-1]:
            y = layer(y)
        return x, y


def fed_forward(*streams: Stream) -> list[torch.Tensor]:
    """The second half of a block, by streams, the longest last.

    The products that end the streams come after all else, because a recomputed block stops before the last of them.
    """
    begun = [stream.begun() for stream in streams]
    pairs = zip(streams, begun, strict=True)
    return [gated_sum(x, stream.modulation[3], stream.layers[-1](y)) for stream, (x, y) in pairs]


def clipped(x: torch.Tensor) -> torch.Tensor:
    """x within fp16's range, as diffusers clips it."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class LeanAdaLayerNormZero(AdaLayerNormZero):
    """`diffusers` adaLN-Zero of joint blocks."""

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
        shift, scale, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
        gate, shift_mlp, scale_mlp, gate_mlp = others
        return modulated(self.norm, x, scale[:, None], shift[:, None]), gate, shift_mlp, scale_mlp, gate_mlp


class LeanAdaLayerNormZeroSingle(AdaLayerNormZeroSingle):
    """`diffusers` adaLN-Zero of single-stream blocks."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if emb is None or not serves(x, self.norm):
            return super().forward(x, emb)
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return modulated(self.norm, x, scale[:, None], shift[:, None]), gate


class LeanSD35AdaLayerNormZeroX(SD35AdaLayerNormZeroX):
    """`diffusers` adaLN-Zero of SD3.5's blocks with two attentions."""

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        if emb is None or not serves(hidden_states, self.norm):
            return super().forward(hidden_states, emb)
        shift, scale, *others, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
        first = modulated(self.norm, hidden_states, scale[:, None], shift[:, None])
        return first, *others, modulated(self.norm, hidden_states, scale2[:, None], shift2[:, None]), gate2


class LeanAdaLayerNormContinuous(AdaLayerNormContinuous):
    """`diffusers` adaptive norm at the end of a transformer, and of the text in SD3's last block."""

    def forward(self, x: torch.Tensor, conditioning_embedding: torch.Tensor) -> torch.Tensor:
        if not serves(x, self.norm):
            return super().forward(x, conditioning_embedding)
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return modulated(self.norm, x, scale[:, None], shift[:, None])


LEAN[AdaLayerNormZero] = LeanAdaLayerNormZero
LEAN[AdaLayerNormZeroSingle] = LeanAdaLayerNormZeroSingle
LEAN[SD35AdaLayerNormZeroX] = LeanSD35AdaLayerNormZeroX
LEAN[AdaLayerNormContinuous] = LeanAdaLayerNormContinuous
