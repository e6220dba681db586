"""Pipelines with random weights, written as folders in the real diffusers format.

Tests and benchmarks need models of a chosen size without a download. The folders made here hold
the same files under the same names as the published Stable Diffusion and SDXL models, so everything
that reads those (diffusers, this package, trl) reads these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import CLIPTextConfig

CONTEXT_LENGTH = 77
_MERGES = ("t h", "th e</w>", "r e", "re d</w>", "c a", "ca t</w>", "d o", "do g</w>", "a n", "an d</w>")


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
            text_encoder=CLIPTextModel(_text_config(text_width, pad_token_id=_end_id())),
            tokenizer=_tokenizer(Path(folder) / "tokenizer", pad_token="<|endoftext|>"),
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
            text_encoder=CLIPTextModel(_text_config(text_width, pad_token_id=_end_id())),
            text_encoder_2=CLIPTextModelWithProjection(second),
            tokenizer=_tokenizer(Path(folder) / "tokenizer", pad_token="<|endoftext|>"),
            tokenizer_2=_tokenizer(Path(folder) / "tokenizer_2", pad_token="!"),
            unet=_unet(unet_widths, latent_size, 2 * text_width, norm_groups, heads, layers_per_block, conditioning),
            scheduler=_scheduler(),
            add_watermarker=False,
        )
    return _save(pipe, Path(folder), {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"})


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
        vocab_size=len(_vocabulary()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection_dim,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act=hidden_act,
        bos_token_id=_end_id() - 1,
        eos_token_id=_end_id(),
        pad_token_id=pad_token_id,
    )


def _vocabulary() -> dict[str, int]:
    """Token to id in the order of CLIP's own vocabulary: bytes, bytes that end a word, merges, the two marks."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = len([byte for byte in range(256) if byte not in printable])
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(rest)]
    merged = [merge.replace(" ", "") for merge in _MERGES]
    tokens = letters + [letter + "</w>" for letter in letters] + merged + ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}


def _end_id() -> int:
    return _vocabulary()["<|endoftext|>"]


def _tokenizer(folder: Path, pad_token: str) -> Any:
    from transformers import CLIPTokenizer

    _write_tokenizer(folder, pad_token)
    return CLIPTokenizer.from_pretrained(folder)


def _write_tokenizer(folder: Path, pad_token: str) -> None:
    """The four files of a published CLIP tokenizer, which transformers 4 and 5 both read."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
    }
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT_LENGTH,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        **special,
    }
    (folder / "vocab.json").write_text(json.dumps(_vocabulary(), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_MERGES]) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _save(pipe: Any, folder: Path, pad_tokens: dict[str, str]) -> Path:
    pipe.save_pretrained(folder)
    for name, pad_token in pad_tokens.items():  # transformers 5 writes tokenizers that transformers 4 cannot read
        for file in (folder / name).iterdir():
            file.unlink()
        _write_tokenizer(folder / name, pad_token)
    _restore_prefix(folder / "text_encoder" / "model.safetensors")
    return folder


def _restore_prefix(file: Path) -> None:
    """Name CLIPTextModel's weights `text_model.*`, as in every published model; transformers 5 drops the prefix."""
    from safetensors.torch import load_file, save_file

    state = load_file(file)
    if not all(name.startswith("text_model.") for name in state):
        save_file({f"text_model.{name}": tensor for name, tensor in state.items()}, file, metadata={"format": "pt"})
