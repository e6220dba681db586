"""The networks of the published models: their configurations, and their layers without weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from alignprop_fast.models.classes import diffusers_class, library_class

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "norm_num_groups": 32,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "norm_num_groups": 32,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


_SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}


_SD35_LARGE = {
    **_SD35_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "dual_attention_layers": (),
}


_FLUX_DEV = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}


_Z_IMAGE = {
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}


_FLUX2_KLEIN_4B = {
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "axes_dims_rope": (32, 32, 32, 32),
    "guidance_embeds": False,
}


_FLUX2_KLEIN_9B = {
    **_FLUX2_KLEIN_4B,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}


_FLUX2_DEV = {
    **_FLUX2_KLEIN_4B,
    "num_layers": 8,
    "num_single_layers": 48,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "guidance_embeds": True,
}


_QWEN_IMAGE = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
}


_DENOISERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("UNet2DConditionModel", UNETS["sd15"]),
    "sdxl": ("UNet2DConditionModel", UNETS["sdxl"]),
    "sd35-medium": ("SD3Transformer2DModel", _SD35_MEDIUM),
    "sd35-large": ("SD3Transformer2DModel", _SD35_LARGE),
    "flux-dev": ("FluxTransformer2DModel", _FLUX_DEV),
    "chroma": ("ChromaTransformer2DModel", {}),  # the class's own defaults
    "z-image": ("ZImageTransformer2DModel", _Z_IMAGE),
    "flux2-klein-4b": ("Flux2Transformer2DModel", _FLUX2_KLEIN_4B),
    "flux2-klein-9b": ("Flux2Transformer2DModel", _FLUX2_KLEIN_9B),
    "flux2-dev": ("Flux2Transformer2DModel", _FLUX2_DEV),
    "qwen-image": ("QwenImageTransformer2DModel", _QWEN_IMAGE),
    "lumina2": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
    "sana": ("SanaTransformer2DModel", {}),  # of 1.6 B parameters
    "krea2": ("Krea2Transformer2DModel", {}),  # the class's own defaults
}


VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


_FLOW_VAE = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


_FLUX_VAE = {**_FLOW_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}


_VAES: dict[str, dict[str, Any]] = {
    "sd15": {"scaling_factor": 0.18215, "force_upcast": False},
    "sdxl": {"scaling_factor": 0.13025},
    "sd35-medium": {**_FLOW_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux-dev": _FLUX_VAE,
    "chroma": _FLUX_VAE,
    "z-image": _FLUX_VAE,
    "lumina2": _FLUX_VAE,
}


_DC_AE: dict[str, Any] = {
    **{f"{part}_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3 for part in ("encoder", "decoder")},
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}


CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}


CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


_GEMMA2_2B = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}


_QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


_QWEN3_8B = {**_QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}


_MISTRAL_24B = {
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


_QWEN2_5_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


_QWEN3_VL_4B = {**_QWEN3_4B, "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]}}


_QWEN3_EYES = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}


_QWEN2_5_EYES = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}


def denoiser_network(name: str) -> nn.Module:
    class_name, config = _DENOISERS[name]
    return diffusers_class(class_name)(**config)


def is_installed(name: str) -> bool:
    """Whether the installed diffusers has the class of that denoiser."""
    import diffusers

    return hasattr(diffusers, _DENOISERS[name][0])


def vae_network(name: str) -> nn.Module:
    from diffusers import AutoencoderKL

    if name.startswith("flux2"):
        return diffusers_class("AutoencoderKLFlux2")(**VAE)
    if name == "sana":
        return diffusers_class("AutoencoderDC")(**_DC_AE)
    if name in ("qwen-image", "krea2"):
        return diffusers_class("AutoencoderKLQwenImage")()
    return AutoencoderKL(**VAE, **_VAES[name])


def clip_text(config: dict[str, Any], projected: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(vocab_size=49408, **config))


def t5_text() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**_T5_XXL))


def gemma2_text() -> nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**_GEMMA2_2B))


def qwen3_text(name: str) -> nn.Module:
    class_name = "Qwen3ForCausalLM" if name.startswith("flux2") else "Qwen3Model"
    found = library_class("transformers", class_name)
    return found(found.config_class(**(_QWEN3_8B if name == "flux2-klein-9b" else _QWEN3_4B)))


def mistral3_text() -> nn.Module:
    found = library_class("transformers", "Mistral3ForConditionalGeneration")
    text = {"model_type": "mistral", **_MISTRAL_24B}
    return found(found.config_class(text_config=text, tie_word_embeddings=False))  # its eyes are Pixtral's


def qwen2_5_vl_text() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(text_config=_QWEN2_5_7B, vision_config=_QWEN2_5_EYES, tie_word_embeddings=False)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl_text() -> nn.Module:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    eyes = {**_QWEN3_EYES, "deepstack_visual_indexes": [5, 11, 17]}
    return Qwen3VLModel(Qwen3VLConfig(text_config=_QWEN3_VL_4B, vision_config=eyes, tie_word_embeddings=True))


_TEXT_ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "clip-l": lambda: clip_text(CLIP_L, projected=True),
    "clip-g": lambda: clip_text(CLIP_G, projected=True),
    "t5-xxl": t5_text,
}


@functools.cache
def published_layers(name: str) -> Mapping[str, tuple[int, ...]]:
    """`layers` of a published network, a model's denoiser or a text encoder; takes a fraction of a second."""
    with torch.device("meta"):
        return layers(_TEXT_ENCODERS[name]() if name in _TEXT_ENCODERS else denoiser_network(name))


def layers(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The linear layers and convolutions of a network, with or without PEFT's adapters: {path: shape of the weight}."""
    return {
        path.removeprefix("base_model.model.").removesuffix(".base_layer"): tuple(module.weight.shape)
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in path
    }
