"""The pipelines whose text encoders are CLIP and T5. Each function takes a folder, where it puts the tokenizers.

SD, SDXL and SD3 draw 16 x 16 pixels. FLUX and Chroma draw 1024 x 1024 by default, so ask for smaller pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignprop_fast.making.random_weights.networks import (
    FLUX_SCALES,
    HEAD_SIZES,
    HEAD_WIDTH,
    HEADS,
    ROPE_AXES,
    diffusion_scheduler,
    t5,
    text_config,
    unet,
    vae,
)
from alignprop_fast.making.random_weights.tokenizers import clip_tokenizer, end_id, t5_tokenizer


def sd(
    folder: Path,
    *,
    unet_widths: tuple[int, ...] = (32, 64),
    latent_size: int = 8,
    vae_widths: tuple[int, ...] = (16, 32),
    text_width: int = 32,
    norm_groups: int = 8,
    heads: int = 2,
    layers_per_block: int = 1,
) -> Any:
    """A `StableDiffusionPipeline`.

    `unet_widths` are the channels of the UNet's levels, `latent_size` is the side of its latents. The VAE shrinks by
    2 ** (len(vae_widths) - 1).
    """
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    return StableDiffusionPipeline(
        vae=vae(0.18215, widths=vae_widths, norm_groups=norm_groups),
        text_encoder=CLIPTextModel(text_config(text_width, pad_token_id=end_id())),
        tokenizer=clip_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>"),
        unet=unet(text_width, layers_per_block, unet_widths, latent_size, norm_groups, heads),
        scheduler=diffusion_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(folder: Path, *, text_width: int = 16, second_text_width: int | None = None, layers_per_block: int = 1) -> Any:
    """A `StableDiffusionXLPipeline` (two text encoders, size conditioning).

    The second text encoder has `second_text_width` channels (None: as many as the first), and the cross-attention takes
    the channels of both.
    """
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    pooled, time_width, second_width = 32, 8, second_text_width or text_width
    second = text_config(second_width, pad_token_id=0, projection_dim=pooled, hidden_act="gelu")
    return StableDiffusionXLPipeline(
        vae=vae(0.13025),
        text_encoder=CLIPTextModel(text_config(text_width, pad_token_id=end_id())),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=clip_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>"),
        tokenizer_2=clip_tokenizer(folder / "tokenizer_2", pad_token="!"),
        unet=unet(
            text_width + second_width,
            layers_per_block,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_width,
            projection_class_embeddings_input_dim=pooled + 6 * time_width,
        ),
        scheduler=diffusion_scheduler(),
        add_watermarker=False,
    )


def sd3(folder: Path) -> Any:
    """A `StableDiffusion3Pipeline` like SD3.5-medium: three text encoders, dual attention in all layers but the
    last."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    clips = [text_config(16, pad_token_id=end_id()), text_config(16, pad_token_id=0, hidden_act="gelu")]
    return StableDiffusion3Pipeline(
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(clips[0]),
        text_encoder_2=CLIPTextModelWithProjection(clips[1]),
        text_encoder_3=t5(32),
        tokenizer=clip_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>"),
        tokenizer_2=clip_tokenizer(folder / "tokenizer_2", pad_token="!"),
        tokenizer_3=t5_tokenizer(folder / "tokenizer_3"),
        transformer=SD3Transformer2DModel(
            sample_size=8,
            num_layers=3,
            joint_attention_dim=32,
            caption_projection_dim=HEADS * HEAD_WIDTH,
            pooled_projection_dim=sum(clip.projection_dim for clip in clips),
            pos_embed_max_size=16,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
            **HEAD_SIZES,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(folder: Path, *, guidance_embeds: bool = True) -> Any:
    """A `FluxPipeline` like FLUX.1-dev (guidance embedding, dynamic shift), or without both like FLUX.1-schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    return FluxPipeline(
        vae=vae(*FLUX_SCALES),
        text_encoder=CLIPTextModel(text_config(16, pad_token_id=end_id())),
        text_encoder_2=t5(32),
        tokenizer=clip_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>"),
        tokenizer_2=t5_tokenizer(folder / "tokenizer_2"),
        transformer=FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=ROPE_AXES,
            **HEAD_SIZES,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance_embeds else 1.0,
            use_dynamic_shifting=guidance_embeds,
            base_shift=0.5,
            max_shift=1.15,
            max_image_seq_len=4096,
        ),
    )


def chroma(folder: Path) -> Any:
    """A `ChromaPipeline`."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    return ChromaPipeline(
        vae=vae(*FLUX_SCALES),
        text_encoder=t5(32),
        tokenizer=t5_tokenizer(folder / "tokenizer"),
        transformer=ChromaTransformer2DModel(
            num_layers=1,
            num_single_layers=2,
            joint_attention_dim=32,
            axes_dims_rope=ROPE_AXES,
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=2,
            **HEAD_SIZES,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
