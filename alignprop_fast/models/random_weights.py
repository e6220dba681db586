"""Pipelines with random weights, written as folders in the real diffusers format.

Tests and benchmarks need models of a chosen size without a download. The folders made here hold
the same files under the same names as the published Stable Diffusion, SDXL, SD3.5 and FLUX models, so everything
that reads those (diffusers, this package, trl) reads these.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignprop_fast.models.random_tokenizers import (
    CONTEXT_LENGTH,
    clip_tokenizer,
    clip_vocabulary,
    end_id,
    t5_tokenizer,
    t5_vocabulary,
    write_clip_tokenizer,
)

if TYPE_CHECKING:
    from transformers import CLIPTextConfig


def make_sd_folder(
    folder: str | Path,
    *,
    unet_widths: tuple[int, ...] = (32, 64),
    latent_size: int = 8,
    vae_widths: tuple[int, ...] = (16, 32),
    text_width: int = 32,
    norm_groups: int = 8,
    heads: int = 2,
    layers_per_block: int = 1,
    seed: int = 0,
) -> Path:
    """Write a `StableDiffusionPipeline` with random fp32 weights and return its folder.

    `unet_widths` are the channels of the UNet's levels, `latent_size` the side of its latents;
    the VAE shrinks by 2 ** (len(vae_widths) - 1). Weights depend on `seed` alone; the global
    random-number state is left as it was.
    """
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=_vae(vae_widths, norm_groups, scaling_factor=0.18215),
            text_encoder=CLIPTextModel(_text_config(text_width, pad_token_id=end_id())),
            tokenizer=clip_tokenizer(Path(folder) / "tokenizer", pad_token="<|endoftext|>"),
            unet=_unet(unet_widths, latent_size, text_width, norm_groups, heads, layers_per_block),
            scheduler=_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _save(pipe, Path(folder), {"tokenizer": "<|endoftext|>"})


def make_sdxl_folder(
    folder: str | Path,
    *,
    unet_widths: tuple[int, ...] = (32, 64),
    latent_size: int = 8,
    vae_widths: tuple[int, ...] = (16, 32),
    text_width: int = 16,
    norm_groups: int = 8,
    heads: int = 2,
    layers_per_block: int = 1,
    seed: int = 0,
) -> Path:
    """Write a `StableDiffusionXLPipeline` (two text encoders, size conditioning) with random weights.

    Arguments as in `make_sd_folder`; both text encoders have `text_width` channels, so that the
    cross-attention sees 2 * text_width.
    """
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    pooled, time_width = 32, 8
    conditioning = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_width,
        "projection_class_embeddings_input_dim": pooled + 6 * time_width,
    }
    second = _text_config(text_width, pad_token_id=0, projection_dim=pooled, hidden_act="gelu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionXLPipeline(
            vae=_vae(vae_widths, norm_groups, scaling_factor=0.13025),
            text_encoder=CLIPTextModel(_text_config(text_width, pad_token_id=end_id())),
            text_encoder_2=CLIPTextModelWithProjection(second),
            tokenizer=clip_tokenizer(Path(folder) / "tokenizer", pad_token="<|endoftext|>"),
            tokenizer_2=clip_tokenizer(Path(folder) / "tokenizer_2", pad_token="!"),
            unet=_unet(unet_widths, latent_size, 2 * text_width, norm_groups, heads, layers_per_block, conditioning),
            scheduler=_scheduler(),
            add_watermarker=False,
        )
    return _save(pipe, Path(folder), {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"})


def make_sd3_folder(
    folder: str | Path,
    *,
    heads: int = 2,
    head_width: int = 16,
    num_layers: int = 3,
    latent_size: int = 8,
    vae_widths: tuple[int, ...] = (16, 32),
    text_width: int = 16,
    norm_groups: int = 8,
    seed: int = 0,
) -> Path:
    """Write a `StableDiffusion3Pipeline` as SD3.5-medium is (three text encoders, dual attention) with random weights.

    Arguments as in `make_sd_folder`; the transformer has `heads` of `head_width` channels, and dual attention in all
    layers but the last; T5 has twice `text_width` channels.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    width, folder = heads * head_width, Path(folder)
    clips = [
        _text_config(text_width, pad_token_id=pad, hidden_act=act)
        for pad, act in ((end_id(), "quick_gelu"), (0, "gelu"))
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusion3Pipeline(
            vae=_flow_vae(vae_widths, norm_groups, scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=CLIPTextModelWithProjection(clips[0]),
            text_encoder_2=CLIPTextModelWithProjection(clips[1]),
            text_encoder_3=_t5(2 * text_width),
            tokenizer=clip_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>"),
            tokenizer_2=clip_tokenizer(folder / "tokenizer_2", pad_token="!"),
            tokenizer_3=t5_tokenizer(folder / "tokenizer_3"),
            transformer=SD3Transformer2DModel(
                sample_size=latent_size,
                num_layers=num_layers,
                attention_head_dim=head_width,
                num_attention_heads=heads,
                joint_attention_dim=2 * text_width,
                caption_projection_dim=width,
                pooled_projection_dim=sum(clip.projection_dim for clip in clips),
                pos_embed_max_size=2 * latent_size,
                dual_attention_layers=tuple(range(num_layers - 1)),
                qk_norm="rms_norm",
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    return _save(pipe, folder, {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"})


def make_flux_folder(
    folder: str | Path,
    *,
    heads: int = 2,
    head_width: int = 16,
    num_layers: int = 1,
    num_single_layers: int = 2,
    vae_widths: tuple[int, ...] = (16, 32),
    text_width: int = 16,
    norm_groups: int = 8,
    seed: int = 0,
) -> Path:
    """Write a `FluxPipeline` as FLUX.1-dev is (guidance embedding, dynamic shift) with random weights.

    Arguments as in `make_sd3_folder`; head_width is a multiple of 8. The pipeline's own picture size is 128 latents
    whatever the model: ask for a smaller one.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FluxPipeline(
            vae=_flow_vae(vae_widths, norm_groups, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=CLIPTextModel(_text_config(text_width, pad_token_id=end_id())),
            text_encoder_2=_t5(2 * text_width),
            tokenizer=clip_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>"),
            tokenizer_2=t5_tokenizer(folder / "tokenizer_2"),
            transformer=FluxTransformer2DModel(
                num_layers=num_layers,
                num_single_layers=num_single_layers,
                attention_head_dim=head_width,
                num_attention_heads=heads,
                joint_attention_dim=2 * text_width,
                pooled_projection_dim=text_width,
                guidance_embeds=True,
                axes_dims_rope=(head_width // 4, 3 * head_width // 8, 3 * head_width // 8),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
            ),
        )
    return _save(pipe, folder, {"tokenizer": "<|endoftext|>"})


def _unet(
    widths: tuple[int, ...],
    latent_size: int,
    cross_width: int,
    norm_groups: int,
    heads: int,
    layers_per_block: int,
    conditioning: dict[str, Any] | None = None,
) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    levels = len(widths)
    return UNet2DConditionModel(
        sample_size=latent_size,
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=cross_width,
        attention_head_dim=heads,  # diffusers reads this field as the number of heads
        norm_num_groups=norm_groups,
        **(conditioning or {}),
    )


def _vae(widths: tuple[int, ...], norm_groups: int, scaling_factor: float) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    levels = len(widths)
    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=norm_groups,
        scaling_factor=scaling_factor,
    )


def _flow_vae(widths: tuple[int, ...], norm_groups: int, scaling_factor: float, shift_factor: float) -> torch.nn.Module:
    """The VAE of SD3 and FLUX: 16 channels, a shift, no convolutions around the latents."""
    from diffusers import AutoencoderKL

    levels = len(widths)
    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=16,
        norm_num_groups=norm_groups,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _t5(width: int) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_vocabulary()),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _text_config(
    width: int, pad_token_id: int, projection_dim: int = 32, hidden_act: str = "quick_gelu"
) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(clip_vocabulary()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection_dim,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act=hidden_act,
        bos_token_id=end_id() - 1,
        eos_token_id=end_id(),
        pad_token_id=pad_token_id,
    )


def _save(pipe: Any, folder: Path, pad_tokens: dict[str, str]) -> Path:
    pipe.save_pretrained(folder)
    for name, pad_token in pad_tokens.items():  # transformers 5 writes tokenizers that transformers 4 cannot read
        for file in (folder / name).iterdir():
            file.unlink()
        write_clip_tokenizer(folder / name, pad_token)
    index = folder / "model_index.json"
    # The name that every published model has; transformers 5 merged the two classes under the slow one's.
    index.write_text(index.read_text(encoding="utf-8").replace('"T5Tokenizer"', '"T5TokenizerFast"'), encoding="utf-8")
    _restore_prefix(folder / "text_encoder" / "model.safetensors")
    return folder


def _restore_prefix(file: Path) -> None:
    """Name CLIPTextModel's weights `text_model.*`, as in every published model; transformers 5 drops the prefix."""
    from safetensors.torch import load_file, save_file

    state = load_file(file)
    if not any(name.startswith("text_model.") for name in state):
        save_file({f"text_model.{name}": tensor for name, tensor in state.items()}, file, metadata={"format": "pt"})
