"""The pipelines whose text encoders are language models. Each function takes a folder, where it puts the tokenizers.

They draw 1024 x 1024 pixels by default, so ask for smaller pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alignprop_fast.making.random_weights.networks import (
    FLUX_SCALES,
    HEAD_SIZES,
    HEAD_WIDTH,
    HEADS,
    ROPE_AXES,
    dc_ae,
    flux2_vae,
    gemma2,
    mistral3,
    qwen2_5_vl,
    qwen3,
    qwen3_vl,
    qwen_vae,
    vae,
)
from alignprop_fast.making.random_weights.tokenizers import KREA_MARKS, MISTRAL_CHAT, gemma_tokenizer, qwen_tokenizer


def z_image(folder: Path, *, turbo: bool = False) -> Any:
    """A `ZImagePipeline` like Z-Image or like Z-Image-Turbo, which differ in the scheduler's shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        dim=HEADS * HEAD_WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=16,
        axes_dims=list(ROPE_AXES),
        axes_lens=[1536, 64, 64],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token, std=0.5)  # zero when made anew, but not in published weights
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if turbo else 6.0),
        vae=vae(*FLUX_SCALES),
        text_encoder=qwen3(),
        tokenizer=qwen_tokenizer(folder / "tokenizer"),
        transformer=transformer,
    )


def flux2_klein(folder: Path, *, distilled: bool = False) -> Any:
    """A `Flux2KleinPipeline`. Its Qwen3 has 28 layers, because the pipeline reads the outputs of 9, 18 and 27."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=qwen3(num_layers=28, causal_lm=True),
        tokenizer=qwen_tokenizer(folder / "tokenizer"),
        transformer=_flux2_transformer(guidance_embeds=False),
        is_distilled=distilled,
    )


def flux2_dev(folder: Path) -> Any:
    """A `Flux2Pipeline`.

    Its tokenizer reads texts alone. That of the published model reads pictures too and so needs torchvision.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline

    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=mistral3(),
        tokenizer=qwen_tokenizer(folder / "tokenizer", MISTRAL_CHAT),
        transformer=_flux2_transformer(guidance_embeds=True),
    )


def _flux2_transformer(guidance_embeds: bool) -> torch.nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=48,  # three layers' outputs, each 16 channels
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
        **HEAD_SIZES,
    )


def qwen_image(folder: Path) -> Any:
    """A `QwenImagePipeline`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=qwen_vae((8, 16)),
        text_encoder=qwen2_5_vl(),
        tokenizer=qwen_tokenizer(folder / "tokenizer"),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=32,
            axes_dims_rope=ROPE_AXES,
            **HEAD_SIZES,
        ),
    )


def krea2(folder: Path, *, distilled: bool = False) -> Any:
    """A `Krea2Pipeline`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_key_value_heads=1,
        intermediate_size=2 * HEADS * HEAD_WIDTH,
        timestep_embed_dim=16,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=ROPE_AXES,
        **HEAD_SIZES,
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith(("scale_shift_table", "norm1.weight", "norm_q.weight")):
            torch.nn.init.normal_(parameter, std=0.2)  # zero when made anew, but not in published weights
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400
        ),
        vae=qwen_vae((8, 16)),
        text_encoder=qwen3_vl(),
        tokenizer=qwen_tokenizer(folder / "tokenizer", marks=KREA_MARKS),
        transformer=transformer,
        text_encoder_select_layers=(1, 3),
        is_distilled=distilled,
    )


def lumina2(folder: Path) -> Any:
    """A `Lumina2Pipeline`. Its VAE shrinks by 8, because the pipeline takes that for granted."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        hidden_size=HEADS * HEAD_WIDTH,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=ROPE_AXES,
        cap_feat_dim=32,
    )
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            torch.nn.init.normal_(parameter, 1.0, 0.2)  # norms; one when made anew, but not in published weights
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(*FLUX_SCALES, widths=(8, 8, 8, 16)),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(folder / "tokenizer"),
    )


def sana(folder: Path) -> Any:
    """A `SanaPipeline`."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    return SanaPipeline(
        tokenizer=gemma_tokenizer(folder / "tokenizer"),
        text_encoder=gemma2(),
        vae=dc_ae(),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
        ),
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    )
