"""SANA as a chain: flow matching, linear attention, Gemma 2, latents of a 32nd of the picture's side."""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d, EfficientViTBlock, ResBlock
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import nn

from alignprop_fast.models.conditioning import Conditioning, PromptBatch
from alignprop_fast.models.pipeline_adapter import PipelineAdapter, instances
from alignprop_fast.models.schedules import FLOW_SOLVER
from alignprop_fast.prompts.limits import TextReader

TEXT_TOKENS = 300  # of a prompt; those of the instruction before it are read and dropped


class SanaAdapter(PipelineAdapter):
    """`SanaPipeline` (Xie et al. 2024, arXiv 2410.10629) without `use_resolution_binning`; see `PipelineAdapter`."""

    schedulers = FLOW_SOLVER
    embedding_names: ClassVar[Sequence[str]] = ("prompt_embeds",)
    text_mask = "prompt_attention_mask"
    text_parts = ("text_encoder", "tokenizer")

    @property
    def denoiser(self) -> Any:
        return self.pipe.transformer

    @property
    def size_multiple(self) -> int:
        return int(self.pipe.vae_scale_factor * self.denoiser.config.patch_size)

    @property
    def noise_dtype(self) -> torch.dtype:
        return torch.float32

    def encode(self, batch: PromptBatch) -> Conditioning:
        for name in batch.embeddings:
            if name.endswith("embeds") and name.replace("embeds", "attention_mask") not in batch.embeddings:
                raise ValueError(f"{name} come without a mask: give {name.replace('embeds', 'attention_mask')} too")
        embeds, mask, negative, negative_mask = self.pipe.encode_prompt(
            batch.prompts,
            batch.guided,
            batch.negative_prompts or "",
            device=self.device,
            max_sequence_length=TEXT_TOKENS,
            complex_human_instruction=self._instruction(),
            **batch.embeddings,
        )
        if batch.guided:
            embeds, mask = torch.cat([negative, embeds]), torch.cat([negative_mask, mask])
        return Conditioning(embeds, {"encoder_attention_mask": mask}, 1 + batch.guided)

    def _instruction(self) -> list[str]:
        """What the pipeline's call puts before each prompt, line by line."""
        return list(inspect.signature(type(self.pipe).__call__).parameters["complex_human_instruction"].default)

    def text_readers(self) -> list[TextReader]:
        found = self.pipe.components.get("tokenizer")
        before = 0 if found is None else len(found.encode("\n".join(self._instruction())))
        return self._reader("Gemma 2", "tokenizer", before + TEXT_TOKENS - 2, self._in_chat)

    def _in_chat(self, text: str, tokenizer: Any) -> str:
        return "\n".join(self._instruction()) + text.lower().strip()  # the pipeline lowers it

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        count, width = (1 + guided) * batch, self.denoiser.config.caption_channels
        embeds = torch.zeros(count, TEXT_TOKENS, width, dtype=self.dtype, device=self.device)
        mask = torch.ones(count, TEXT_TOKENS, dtype=torch.long, device=self.device)
        return Conditioning(embeds, {"encoder_attention_mask": mask}, 1 + guided)

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        x_BCHW = torch.cat([x.to(self.dtype)] * cond.branches)
        time = timestep.expand(len(x_BCHW)) * self.denoiser.config.timestep_scale
        return self.denoiser(
            x_BCHW, encoder_hidden_states=cond.embeds, timestep=time, **(cond.added or {}), return_dict=False
        )[0]

    def step_groups(self) -> dict[str, list[nn.Module]]:
        return {"transformers": instances(self.denoiser, (SanaTransformerBlock,))}

    def decoder_groups(self) -> dict[str, list[nn.Module]]:
        return {"decoder": instances(self.pipe.vae.decoder, (ResBlock, EfficientViTBlock, DCUpBlock2d))}
