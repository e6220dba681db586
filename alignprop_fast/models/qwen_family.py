"""What Qwen-Image and Krea 2 share: texts with a mask, and a VAE that is made for videos."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageResample,
    QwenImageResidualBlock,
)
from torch import nn

import alignprop_fast.models.lean.qwen_decoder  # noqa: F401  # enters the decoder's layers in the tables of ops
from alignprop_fast.models.conditioning import Conditioning, Embeddings, PromptBatch, padded
from alignprop_fast.models.flow_transformer import TokenAdapter
from alignprop_fast.models.pipeline_adapter import instances
from alignprop_fast.models.qwen_chat import QWEN_TOKENS

_MULTIPLE = 32  # tokens; a recorded step serves all batches whose longest text is as long after rounding up


class QwenFamilyAdapter(TokenAdapter):
    """A pipeline that masks the padding of its texts and decodes by `AutoencoderKLQwenImage`.

    The mask is left out where all texts of a batch have one length. The VAE's latents have a mean and a deviation for
    each channel.
    """

    embedding_names: ClassVar[Sequence[str]] = ("prompt_embeds",)
    text_mask = "prompt_embeds_mask"
    text_parts = ("text_encoder", "tokenizer")

    def encode(self, batch: PromptBatch) -> Conditioning:
        negative = batch.negative_prompts or [""] * len(batch.prompts)
        texts = self._texts(negative, batch.embeddings, "negative_") if batch.guided else []
        texts += self._texts(batch.prompts, batch.embeddings, "")
        return self._conditioning(texts, batch.guided, batch.size)

    def _texts(self, prompts: list[str], given: Embeddings, side: str) -> list[torch.Tensor]:
        """The embedded texts [N_i, ...] without padding, or those given for that side."""
        embeds, mask = given.get(f"{side}prompt_embeds"), given.get(f"{side}{self.text_mask}")
        if embeds is not None and not isinstance(embeds, torch.Tensor):
            return list(embeds)
        if embeds is not None and mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        embeds, mask = self.pipe.encode_prompt(
            prompts, self.device, prompt_embeds=embeds, prompt_embeds_mask=mask, max_sequence_length=QWEN_TOKENS
        )
        return list(embeds) if mask is None else [row[kept.bool()] for row, kept in zip(embeds, mask, strict=True)]

    def _blank(self, width: tuple[int, ...], batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        """The conditioning of the longest texts, of this width for each token."""
        text = torch.zeros(QWEN_TOKENS, *width, dtype=self.dtype, device=self.device)
        return self._conditioning([text] * ((1 + guided) * batch), guided, size)

    def _conditioning(self, texts: Sequence[torch.Tensor], guided: bool, size: tuple[int, int]) -> Conditioning:
        """Of texts without padding, for pictures of this size in pixels."""
        embeds, lengths = padded(texts, QWEN_TOKENS)
        mask = torch.arange(embeds.shape[1]) < torch.tensor(lengths)[:, None]
        added = {"mask": mask.to(embeds.device)}
        return Conditioning(embeds, added, 1 + guided, lengths=lengths, multiple=_MULTIPLE)

    def _text_and_mask(self, cond: Conditioning) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Texts as far as shapes go, with a mask if some are shorter."""
        longest, alike = cond.extent
        mask = None if alike else (cond.added or {})["mask"][:, :longest]
        return cond.embeds[:, :longest], mask

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
