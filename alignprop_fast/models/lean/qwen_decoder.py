"""The decoder of Qwen-Image's VAE for one frame, with this package's ops and by bands of rows.

The VAE is made for videos. Its convolutions see the frames before a frame; those of a single picture are zeros.
Importing this file enters the layers in the tables of `surgery` and `banded_decoder`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
    QwenImageDecoder3d,
    QwenImageResample,
    QwenImageResidualBlock,
)
from torch import nn

from alignprop_fast.models.lean.attention import autocasts
from alignprop_fast.models.lean.banded_decoder import BANDED, Forward, learns, pass_on
from alignprop_fast.models.lean.surgery import LEAN
from alignprop_fast.ops.attention import attention
from alignprop_fast.ops.frozen_conv2d import frozen_conv2d
from alignprop_fast.ops.local_bands import by_bands


class FrozenCausalConv3d(QwenImageCausalConv3d):
    """On one frame, a two-dimensional convolution with the last slice of its weight, while its weights are frozen."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        width, _, height, _, before, _ = self._padding
        alone = cache_x is None and x.shape[2] == 1 and before == self.kernel_size[0] - 1
        if not alone or learns(self):
            return super().forward(x, cache_x)
        weight = self.weight[:, :, -1]
        return frozen_conv2d(x.squeeze(2), weight, self.bias, self.stride[1:], (height, width)).unsqueeze(2)


class LeanQwenImageAttentionBlock(QwenImageAttentionBlock):
    """Attention over the pixels of each frame; keeps q, k, v, o and the logsumexp."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if autocasts(x):
            return super().forward(x)
        frames = x.transpose(1, 2).flatten(0, 1)  # [B T, C, H, W]
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).contiguous()
        q, k, v = (part.unsqueeze(1) for part in qkv.chunk(3, dim=-1))
        o = attention(q, k, v).squeeze(1).transpose(1, 2).reshape(frames.shape)
        return self.proj(o).unflatten(0, (len(x), -1)).transpose(1, 2) + x


def _residual(block: Any, rows: int | None) -> list[tuple[nn.Module, Forward]]:
    if learns(block) or (block.dropout.training and block.dropout.p > 0):
        return []
    return [(block, partial(_alone_by_bands, block.forward, 2, 1, rows))]


def _resample(layer: Any, rows: int | None) -> list[tuple[nn.Module, Forward]]:
    return [] if learns(layer) else [(layer, partial(_alone_by_bands, layer.forward, 1, 2, rows))]


def _alone_by_bands(
    own: Forward, halo: int, scale: int, rows: int | None, x: torch.Tensor, feat_cache: Any = None, *index: Any
) -> torch.Tensor:
    """Of a frame without others before it."""
    return by_bands(own, x, halo, scale, rows) if feat_cache is None else own(x, feat_cache, *index)


def _last_layers(decoder: Any, rows: int | None) -> list[tuple[nn.Module, Forward]]:
    norm, act, conv = decoder.norm_out, decoder.nonlinearity, decoder.conv_out
    if learns(norm) or learns(conv):
        return []
    own: list[Forward] = [norm.forward, act.forward, conv.forward]
    # The convolution does all three steps, so the other two modules return their input.
    return [(norm, pass_on), (act, pass_on), (conv, partial(_all_three, own, rows))]


def _all_three(own: Sequence[Forward], rows: int | None, x: torch.Tensor) -> torch.Tensor:
    norm, act, conv = own
    return by_bands(lambda band: conv(act(norm(band))), x, 1, 1, rows)


LEAN[QwenImageCausalConv3d] = FrozenCausalConv3d
LEAN[QwenImageAttentionBlock] = LeanQwenImageAttentionBlock
BANDED[QwenImageResidualBlock] = _residual
BANDED[QwenImageResample] = _resample
BANDED[QwenImageDecoder3d] = _last_layers
