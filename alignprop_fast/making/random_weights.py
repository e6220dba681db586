"""Pipelines with random weights, written as folders in the real diffusers format.

Tests and benchmarks need models of a chosen size without a download. These folders have the same files with the same
names as the published Stable Diffusion, SDXL, SD3.5, FLUX and Z-Image models, so everything that reads those
(diffusers, this package, trl) reads these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alignprop_fast.making.random_networks import (
    dc_ae,
    diffusion_scheduler,
    flux2_vae,
    gemma2,
    mistral3,
    qwen2_5_vl,
    qwen3,
    qwen3_vl,
    qwen_vae,
    t5,
    text_config,
    unet,
    vae,
)
from alignprop_fast.making.random_tokenizers import (
    KREA_MARKS,
    MISTRAL_CHAT,
    clip_tokenizer,
    end_id,
    gemma_tokenizer,
    qwen_tokenizer,
    t5_tokenizer,
    write_clip_tokenizer,
)


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

    `unet_widths` are the channels of the UNet's levels, `latent_size` is the side of its latents. The VAE shrinks by
    2 ** (len(vae_widths) - 1). Weights depend only on `seed`; the global random-number state does not change.
    """
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=vae(vae_widths, norm_groups, scaling_factor=0.18215),
            text_encoder=CLIPTextModel(text_config(text_width, pad_token_id=end_id())),
            tokenizer=clip_tokenizer(Path(folder) / "tokenizer", pad_token="<|endoftext|>"),
            unet=unet(unet_widths, latent_size, text_width, norm_groups, heads, layers_per_block),
            scheduler=diffusion_scheduler(),
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
    second_text_width: int | None = None,
    norm_groups: int = 8,
    heads: int = 2,
    layers_per_block: int = 1,
    seed: int = 0,
) -> Path:
    """Write a `StableDiffusionXLPipeline` (two text encoders, size conditioning) with random weights.

    Arguments as in `make_sd_folder`. The second text encoder has `second_text_width` channels (None: as many as the
    first), and the cross-attention takes the channels of both.
    """
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    pooled, time_width, second_width = 32, 8, second_text_width or text_width
    cross_width = text_width + second_width
    conditioning = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_width,
        "projection_class_embeddings_input_dim": pooled + 6 * time_width,
    }
    second = text_config(second_width, pad_token_id=0, projection_dim=pooled, hidden_act="gelu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionXLPipeline(
            vae=vae(vae_widths, norm_groups, scaling_factor=0.13025),
            text_encoder=CLIPTextModel(text_config(text_width, pad_token_id=end_id())),
            text_encoder_2=CLIPTextModelWithProjection(second),
            tokenizer=clip_tokenizer(Path(folder) / "tokenizer", pad_token="<|endoftext|>"),
            tokenizer_2=clip_tokenizer(Path(folder) / "tokenizer_2", pad_token="!"),
            unet=unet(unet_widths, latent_size, cross_width, norm_groups, heads, layers_per_block, conditioning),
            scheduler=diffusion_scheduler(),
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
    """Write a `StableDiffusion3Pipeline` like SD3.5-medium (three text encoders, dual attention) with random weights.

    Arguments as in `make_sd_folder`. The transformer has `heads` heads of `head_width` channels, and dual attention in
    all layers but the last. T5 has twice `text_width` channels.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    width, folder = heads * head_width, Path(folder)
    clips = [
        text_config(text_width, pad_token_id=pad, hidden_act=act)
        for pad, act in ((end_id(), "quick_gelu"), (0, "gelu"))
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusion3Pipeline(
            vae=vae(vae_widths, norm_groups, scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=CLIPTextModelWithProjection(clips[0]),
            text_encoder_2=CLIPTextModelWithProjection(clips[1]),
            text_encoder_3=t5(2 * text_width),
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
    guidance_embeds: bool = True,
    seed: int = 0,
) -> Path:
    """Write a `FluxPipeline` like FLUX.1-dev (guidance embedding, dynamic shift) with random weights.

    Without `guidance_embeds` it is like FLUX.1-schnell (no guidance embedding, no shift). Other arguments as in
    `make_sd3_folder`; head_width is a multiple of 8. The pipeline's default picture size is 128 latents for every
    model, so ask for a smaller one.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FluxPipeline(
            vae=vae(vae_widths, norm_groups, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=CLIPTextModel(text_config(text_width, pad_token_id=end_id())),
            text_encoder_2=t5(2 * text_width),
            tokenizer=clip_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>"),
            tokenizer_2=t5_tokenizer(folder / "tokenizer_2"),
            transformer=FluxTransformer2DModel(
                num_layers=num_layers,
                num_single_layers=num_single_layers,
                attention_head_dim=head_width,
                num_attention_heads=heads,
                joint_attention_dim=2 * text_width,
                pooled_projection_dim=text_width,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(head_width // 4, 3 * head_width // 8, 3 * head_width // 8),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0 if guidance_embeds else 1.0,
                use_dynamic_shifting=guidance_embeds,
                base_shift=0.5,
                max_shift=1.15,
                max_image_seq_len=4096,
            ),
        )
    return _save(pipe, folder, {"tokenizer": "<|endoftext|>"})


def make_chroma_folder(
    folder: str | Path, *, heads: int = 2, head_width: int = 16, text_width: int = 32, seed: int = 0
) -> Path:
    """Write a `ChromaPipeline` with random weights. Arguments as in `make_flux_folder`.

    T5 has text_width channels.
    """
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = ChromaPipeline(
            vae=vae((16, 32), 8, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=t5(text_width),
            tokenizer=t5_tokenizer(folder / "tokenizer"),
            transformer=ChromaTransformer2DModel(
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=head_width,
                num_attention_heads=heads,
                joint_attention_dim=text_width,
                axes_dims_rope=(head_width // 4, 3 * head_width // 8, 3 * head_width // 8),
                approximator_num_channels=16,
                approximator_hidden_dim=32,
                approximator_layers=2,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    return _save(pipe, folder, {})


def make_z_image_folder(
    folder: str | Path,
    *,
    heads: int = 2,
    head_width: int = 16,
    num_layers: int = 2,
    vae_widths: tuple[int, ...] = (16, 32),
    text_width: int = 16,
    norm_groups: int = 8,
    turbo: bool = False,
    seed: int = 0,
) -> Path:
    """Write a `ZImagePipeline` like Z-Image, or like Z-Image-Turbo, with random weights.

    The two differ in the scheduler's shift. Other arguments as in `make_sd3_folder`; head_width is a multiple of 8. The
    pipeline's default picture has 1024 pixels for every model, so ask for a smaller one.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(
            dim=heads * head_width,
            n_layers=num_layers,
            n_refiner_layers=1,
            n_heads=heads,
            n_kv_heads=heads,
            cap_feat_dim=text_width,
            axes_dims=[head_width // 4, 3 * head_width // 8, 3 * head_width // 8],
            axes_lens=[1536, 64, 64],
        )
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(token, std=0.5)  # zero when made anew, but not in published weights
        pipe = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if turbo else 6.0),
            vae=vae(vae_widths, norm_groups, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=qwen3(text_width),
            tokenizer=qwen_tokenizer(folder / "tokenizer"),
            transformer=transformer,
        )
    return _save(pipe, folder, {})


def make_flux2_klein_folder(
    folder: str | Path,
    *,
    heads: int = 2,
    head_width: int = 16,
    num_layers: int = 1,
    num_single_layers: int = 2,
    vae_widths: tuple[int, ...] = (16, 32),
    text_width: int = 16,
    norm_groups: int = 8,
    distilled: bool = False,
    seed: int = 0,
) -> Path:
    """Write a `Flux2KleinPipeline` with random weights. Arguments as in `make_flux_folder`.

    Its Qwen3 has 28 layers, because the pipeline reads the outputs of layers 9, 18 and 27.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flux2_vae(vae_widths, norm_groups),
            text_encoder=qwen3(text_width, num_layers=28, causal_lm=True),
            tokenizer=qwen_tokenizer(folder / "tokenizer"),
            transformer=_flux2_transformer(heads, head_width, num_layers, num_single_layers, text_width),
            is_distilled=distilled,
        )
    return _save(pipe, folder, {})


def make_flux2_dev_folder(folder: str | Path, *, heads: int = 2, text_width: int = 16, seed: int = 0) -> Path:
    """Write a `Flux2Pipeline` with random weights. Arguments as in `make_flux2_klein_folder`.

    Its tokenizer reads texts alone. That of the published model reads pictures too and so needs torchvision.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flux2_vae((16, 32), 8),
            text_encoder=mistral3(text_width),
            tokenizer=qwen_tokenizer(folder / "tokenizer", MISTRAL_CHAT),
            transformer=_flux2_transformer(heads, 16, 1, 2, text_width, guidance_embeds=True),
        )
    return _save(pipe, folder, {})


def _flux2_transformer(
    heads: int, head_width: int, num_layers: int, num_single_layers: int, text_width: int, guidance_embeds: bool = False
) -> torch.nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=head_width,
        num_attention_heads=heads,
        joint_attention_dim=3 * text_width,
        axes_dims_rope=(head_width // 4,) * 4,
        guidance_embeds=guidance_embeds,
    )


def make_qwen_image_folder(
    folder: str | Path,
    *,
    heads: int = 2,
    head_width: int = 16,
    num_layers: int = 2,
    vae_widths: tuple[int, ...] = (8, 16),
    text_width: int = 32,
    seed: int = 0,
) -> Path:
    """Write a `QwenImagePipeline` with random weights. Arguments as in `make_z_image_folder`.

    text_width is a multiple of 32.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
            ),
            vae=qwen_vae(vae_widths),
            text_encoder=qwen2_5_vl(text_width),
            tokenizer=qwen_tokenizer(folder / "tokenizer"),
            transformer=QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=num_layers,
                attention_head_dim=head_width,
                num_attention_heads=heads,
                joint_attention_dim=text_width,
                axes_dims_rope=(head_width // 4, 3 * head_width // 8, 3 * head_width // 8),
            ),
        )
    return _save(pipe, folder, {})


def make_krea2_folder(
    folder: str | Path,
    *,
    heads: int = 2,
    head_width: int = 16,
    num_layers: int = 2,
    vae_widths: tuple[int, ...] = (8, 16),
    text_width: int = 32,
    distilled: bool = False,
    seed: int = 0,
) -> Path:
    """Write a `Krea2Pipeline` with random weights. Arguments as in `make_qwen_image_folder`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Krea2Transformer2DModel(
            in_channels=16,
            num_layers=num_layers,
            attention_head_dim=head_width,
            num_attention_heads=heads,
            num_key_value_heads=1,
            intermediate_size=2 * heads * head_width,
            timestep_embed_dim=16,
            text_hidden_dim=text_width,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=text_width,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(head_width // 4, 3 * head_width // 8, 3 * head_width // 8),
        )
        for name, parameter in transformer.named_parameters():
            if name.endswith(("scale_shift_table", "norm1.weight", "norm_q.weight")):
                torch.nn.init.normal_(parameter, std=0.2)  # zero when made anew, but not in published weights
        pipe = Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400
            ),
            vae=qwen_vae(vae_widths),
            text_encoder=qwen3_vl(text_width),
            tokenizer=qwen_tokenizer(folder / "tokenizer", marks=KREA_MARKS),
            transformer=transformer,
            text_encoder_select_layers=(1, 3),
            is_distilled=distilled,
        )
    return _save(pipe, folder, {})


def make_lumina2_folder(
    folder: str | Path, *, heads: int = 2, head_width: int = 16, text_width: int = 32, seed: int = 0
) -> Path:
    """Write a `Lumina2Pipeline` with random weights. Arguments as in `make_z_image_folder`.

    Its VAE shrinks by 8, because the pipeline takes that for granted.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Lumina2Transformer2DModel(
            hidden_size=heads * head_width,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=heads,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(head_width // 4, 3 * head_width // 8, 3 * head_width // 8),
            cap_feat_dim=text_width,
        )
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                torch.nn.init.normal_(parameter, 1.0, 0.2)  # norms; one when made anew, but not in published weights
        pipe = Lumina2Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=vae((8, 8, 8, 16), 8, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=gemma2(text_width),
            tokenizer=gemma_tokenizer(folder / "tokenizer"),
        )
    return _save(pipe, folder, {})


def make_sana_folder(folder: str | Path, *, text_width: int = 32, seed: int = 0) -> Path:
    """Write a `SanaPipeline` with random weights. Arguments as in `make_z_image_folder`."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = SanaPipeline(
            tokenizer=gemma_tokenizer(folder / "tokenizer"),
            text_encoder=gemma2(text_width),
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
                caption_channels=text_width,
            ),
            scheduler=DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
            ),
        )
    return _save(pipe, folder, {})


def _save(pipe: Any, folder: Path, pad_tokens: dict[str, str]) -> Path:
    pipe.save_pretrained(folder)
    for name, pad_token in pad_tokens.items():  # transformers 5 writes tokenizers that transformers 4 cannot read
        for file in (folder / name).iterdir():
            file.unlink()
        write_clip_tokenizer(folder / name, pad_token)
    index = folder / "model_index.json"
    # Class names that transformers 4 knows too; the first is that of every published model.
    text = index.read_text(encoding="utf-8").replace('"T5Tokenizer"', '"T5TokenizerFast"')
    index.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")
    if pad_tokens:
        _restore_prefix(folder / "text_encoder" / "model.safetensors")
    return folder


def _restore_prefix(file: Path) -> None:
    """Name CLIPTextModel's weights `text_model.*`, as in every published model; transformers 5 drops the prefix."""
    from safetensors.torch import load_file, save_file

    state = load_file(file)
    if not any(name.startswith("text_model.") for name in state):
        save_file({f"text_model.{name}": tensor for name, tensor in state.items()}, file, metadata={"format": "pt"})
