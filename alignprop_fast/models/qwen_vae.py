"""The VAE of Qwen-Image and Krea 2, which is made for videos, as the decoder of single pictures."""

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageResample,
    QwenImageResidualBlock,
)
from torch import nn

import alignprop_fast.models.lean.qwen_decoder  # noqa: F401  # enters the decoder's layers in the tables of ops
from alignprop_fast.models.flow_transformer import TokenAdapter
from alignprop_fast.models.pipeline_adapter import instances


class QwenVaeAdapter(TokenAdapter):
    """A pipeline with `AutoencoderKLQwenImage`, whose latents have a mean and a deviation for each channel."""

    @property
    def latent_channels(self) -> int:
        return self.pipe.vae.config.z_dim

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        # `vae.decode` also remembers what the frames after this one would need.
        frame = vae.post_quant_conv(self._unscaled(x).to(vae.dtype).unsqueeze(2))
        image = vae.decoder(frame).squeeze(2).clamp(-1, 1)
        return (image.to(x.dtype) / 2 + 0.5).clamp(0, 1)

    def _unscaled(self, x: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        mean, deviation = torch.tensor([config.latents_mean, config.latents_std]).to(x)[..., None, None]
        return x * deviation + mean

    def decoder_groups(self) -> dict[str, list[nn.Module]]:
        kinds = (QwenImageResidualBlock, QwenImageResample, QwenImageAttentionBlock)
        return {"decoder": instances(self.pipe.vae.decoder, kinds)}
