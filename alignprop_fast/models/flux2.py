"""FLUX.2 as a chain: flow matching, latents in patches that the VAE normalises, text from layers of its encoder."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input

import alignprop_fast.models.lean.flux2  # noqa: F401  # enters this model's layers in the tables of ops
from alignprop_fast.models.classes import tokenizer_of
from alignprop_fast.models.conditioning import Conditioning, PromptBatch
from alignprop_fast.models.flow_transformer import TokenAdapter
from alignprop_fast.models.qwen_chat import in_chat
from alignprop_fast.prompts.limits import TextReader

TEXT_TOKENS = 512  # that are read, with the chat's marks


class Flux2Adapter(TokenAdapter):
    """What the pipelines of FLUX.2 (Black Forest Labs 2025) share; see `PipelineAdapter`.

    The chain's latents [B, 4 C, h, w] are the VAE's in patches of 2 x 2, normalised by its batch norm. The transformer
    sees each as one token.
    """

    embedding_names: ClassVar[Sequence[str]] = ("prompt_embeds",)
    text_parts = ("text_encoder", "tokenizer")
    blocks = (Flux2TransformerBlock, Flux2SingleTransformerBlock)

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
                prompts, self.device, prompt_embeds=batch.embeddings.get(name), max_sequence_length=TEXT_TOKENS
            )[0]
            for name, prompts in texts
        ]
        return self._conditioning(torch.cat(found), batch.guided, batch.size)

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        width = self.denoiser.config.joint_attention_dim
        embeds = torch.zeros((1 + guided) * batch, TEXT_TOKENS, width, dtype=self.dtype, device=self.device)
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
        return {"guidance": self.guidance(cond), "encoder_hidden_states": cond.embeds, **(cond.added or {})}

    def pack(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW.flatten(2).transpose(1, 2)

    def unpack(self, y_BNC: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y_BNC.transpose(1, 2).unflatten(2, x.shape[2:])

    def _unscaled(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.pipe.vae.bn
        deviation = (norm.running_var + self.pipe.vae.config.batch_norm_eps).sqrt()
        patches = x * deviation.to(x.dtype)[:, None, None] + norm.running_mean.to(x.dtype)[:, None, None]
        return self.pipe._unpatchify_latents(patches)


class Flux2KleinAdapter(Flux2Adapter):
    """`Flux2KleinPipeline`, distilled or not. A distilled model draws without guidance, whatever the scale."""

    @property
    def heeds_guidance(self) -> bool:
        return not self.pipe.config.is_distilled

    def text_readers(self) -> list[TextReader]:
        return self._reader("Qwen3", "tokenizer", TEXT_TOKENS, partial(in_chat, thinking=False))


class Flux2DevAdapter(Flux2Adapter):
    """`Flux2Pipeline`. As in FLUX.1, the denoiser is told the guidance scale, and `true_cfg_scale` adds guidance."""

    has_true_cfg = True

    def text_readers(self) -> list[TextReader]:
        reader = self.pipe.tokenizer  # of texts and pictures; its tokenizer is without a chat
        if reader is None:
            return []
        return [TextReader("Mistral 3", tokenizer_of(reader), TEXT_TOKENS, None, partial(self._in_chat, reader))]

    def _in_chat(self, reader: Any, text: str, tokenizer: Any) -> str:
        (messages,) = format_input([text], self.pipe.system_message)
        written: str = reader.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        return written.removeprefix(tokenizer.bos_token or "")  # tokenizing adds it again
