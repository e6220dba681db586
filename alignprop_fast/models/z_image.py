"""Z-Image and Z-Image-Turbo as a chain: flow matching, one stream of image and caption, captions of any length."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZImageTransformerBlock

import alignprop_fast.models.lean.z_image  # noqa: F401  # enters this model's layers in the tables of ops
from alignprop_fast.models.conditioning import Conditioning, PromptBatch, padded
from alignprop_fast.models.flow_transformer import FlowTransformerAdapter
from alignprop_fast.models.lean.z_image_network import run_network
from alignprop_fast.models.qwen_chat import QWEN_TOKENS, in_chat
from alignprop_fast.models.schedules import dynamic_shift
from alignprop_fast.prompts.limits import TextReader


class ZImageAdapter(FlowTransformerAdapter):
    """`ZImagePipeline` (Z-Image Team 2025, arXiv 2511.22699); see `PipelineAdapter`.

    The transformer's time is the share of noise that is gone. Its output points from noise to picture, so `predict`
    negates it.
    """

    embedding_names: ClassVar[Sequence[str]] = ("prompt_embeds",)
    text_parts = ("text_encoder", "tokenizer")
    unguided_scale = 0.0
    limits_guidance = True
    blocks = (ZImageTransformerBlock,)

    def __init__(self, pipe: Any):
        if pipe.transformer.dtype == torch.float16:
            raise ValueError("Z-Image overflows in fp16: use bf16 (--mixed-precision bf16) or fp32")
        super().__init__(pipe)

    @property
    def noise_dtype(self) -> torch.dtype:
        return torch.float32

    def _set_timesteps(self, scheduler: Any, num_inference_steps: int, size: tuple[int, int]) -> None:
        sigmas = torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, **dynamic_shift(scheduler.config, self.tokens(size)))

    def encode(self, batch: PromptBatch) -> Conditioning:
        # Copies, because `encode_prompt` writes its chat template into the lists.
        prompts, negative_prompts = list(batch.prompts), batch.negative_prompts and list(batch.negative_prompts)
        texts, negative = self.pipe.encode_prompt(
            prompts,
            self.device,
            batch.guided,
            negative_prompts,
            max_sequence_length=QWEN_TOKENS,
            **batch.embeddings,
        )
        return self._conditioning([*negative, *texts], batch.guided)

    def text_readers(self) -> list[TextReader]:
        return self._reader("Qwen3", "tokenizer", QWEN_TOKENS, partial(in_chat, thinking=True))

    def blank_conditioning(self, batch: int, guided: bool, size: tuple[int, int]) -> Conditioning:
        width = self.denoiser.config.cap_feat_dim
        text = torch.zeros(QWEN_TOKENS, width, dtype=self.dtype, device=self.device)
        return self._conditioning([text] * ((1 + guided) * batch), guided)

    @staticmethod
    def _conditioning(texts: Sequence[torch.Tensor], guided: bool) -> Conditioning:
        embeds, lengths = padded(texts, QWEN_TOKENS)
        added = {"lengths": torch.tensor(lengths, dtype=torch.int32).to(embeds.device)}
        return Conditioning(embeds, added, 1 + guided, lengths=lengths, multiple=SEQ_MULTI_OF, fills=True)

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        assert cond.added is not None
        x_BCHW = torch.cat([x.to(self.dtype)] * cond.branches)
        time = ((1000 - timestep) / 1000).expand(len(x_BCHW))
        return -run_network(self.denoiser, x_BCHW, time, cond.embeds, cond.added["lengths"], *cond.extent)
