"""FLUX.2-klein as a chain: flow matching, latents in patches that the VAE normalises, three layers of Qwen3 as text."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

import alignprop_fast.models.lean.flux2  # noqa: F401  # enters this model's layers in the tables of ops
from alignprop_fast.models.flow_transformer import TokenAdapter
from alignprop_fast.models.pipeline_adapter import Conditioning, PromptBatch
from alignprop_fast.models.qwen_chat import QWEN_TOKENS, in_chat
from alignprop_fast.prompts.limits import TextReader


class Flux2KleinAdapter(TokenAdapter):
    """`Flux2KleinPipeline` (Black Forest Labs 2026), distilled or not; see `PipelineAdapter`.

    The chain's latents [B, 4 C, h, w] are the VAE's in patches of 2 x 2, normalised by its batch norm. The transformer
    sees each as one token. A distilled model draws without guidance, whatever the scale.
    """

    embedding_names: ClassVar[Sequence[str]] = ("prompt_embeds",)
    text_parts = ("text_encoder", "tokenizer")
    blocks = (Flux2TransformerBlock, Flux2SingleTransformerBlock)

    @property
    def heeds_guidance(self) -> bool:
        return not self.pipe.config.is_distilled

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return self.channels_per_latent * self.latent_channels, *self.grid(size)

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, size: tuple[int, int]) -> None:
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=compute_empirical_mu(self.tokens(size), num_inference_steps))

    def encode(self, batch: PromptBatch) -> Conditioning:
        negative = [("negative_prompt_embeds", batch.negative_prompts or [""] * len(batch.prompts))]
        texts = [*(negative if batch.guided else ()), ("prompt_embeds", batch.prompts)]
        found = [
            self.pipe.encode_prompt(
                prompts, self.device, prompt_embeds=batch.embeddings.get(name), max_sequence_length=QWEN_TOKENS
            )[0]
            for name, prompts in texts
        ]
        return self._conditioning(torch.cat(found), batch.guided, batch.size)

    def text_readers(self) -> list[TextReader]:
        return self._reader("Qwen3", "tokenizer", QWEN_TOKENS, partial(in_chat, thinking=False))

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        width = self.denoiser.config.joint_attention_dim
        embeds = torch.zeros((1 + guided) * batch, QWEN_TOKENS, width, dtype=self.dtype, device=self.device)
        return self._conditioning(embeds, guided, size)

    def _conditioning(self, embeds: torch.Tensor, guided: bool, size: tuple[int, int]) -> Conditioning:
        """The conditioning with positions [tokens, 4]: time, row, column, and place in the text."""
        rows, columns = self.grid(size)
        one = torch.arange(1)
        added = {
            "img_ids": torch.cartesian_prod(one, torch.arange(rows), torch.arange(columns), one),
            "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(embeds.shape[1])),
        }
        return Conditioning(embeds, {name: ids.to(embeds.device) for name, ids in added.items()}, 1 + guided)

    def inputs(self, x: torch.Tensor, cond: Conditioning) -> dict[str, Any]:
        return {"guidance": None, "encoder_hidden_states": cond.embeds, **(cond.added or {})}

    def pack(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW.flatten(2).transpose(1, 2)

    def unpack(self, y_BNC: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y_BNC.transpose(1, 2).unflatten(2, x.shape[2:])

    def _unscaled(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.pipe.vae.bn
        deviation = (norm.running_var + self.pipe.vae.config.batch_norm_eps).sqrt()
        patches = x * deviation.to(x.dtype)[:, None, None] + norm.running_mean.to(x.dtype)[:, None, None]
        return self.pipe._unpatchify_latents(patches)
