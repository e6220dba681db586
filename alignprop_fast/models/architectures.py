"""The published models without their weights: real architectures at full size, by name.

    adapter = architecture("sdxl")                   # on the meta device: shapes and bytes only, a second, no memory
    cond = adapter.blank_conditioning(batch=1, guided=True, size=adapter.image_size(None, None))
    x = adapter.initial_latents(1, adapter.image_size(None, None), None, None)
    y = adapter.predict(x, torch.tensor(500.0, device=adapter.device), cond)
    images = adapter.decode(x)
    parameters(adapter)                # {"denoiser": ..., "adapters": ..., "vae": ..., "text": ...}

`architecture` returns what `models.adapt` returns for a real pipeline of that kind: the same adapter class around the
same pipeline class, with LoRA adapters in, tokenizers left out (so `encode` does not work, `blank_conditioning` stands
for it) and text encoders present, since they count as weights. With `device="cuda"` the weights are random.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NAMES = ("sd15", "sdxl", "sd35-medium", "flux-dev")

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

_DENOISERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("UNet2DConditionModel", UNETS["sd15"]),
    "sdxl": ("UNet2DConditionModel", UNETS["sdxl"]),
    "sd35-medium": ("SD3Transformer2DModel", _SD35_MEDIUM),
    "sd35-large": ("SD3Transformer2DModel", _SD35_LARGE),
    "flux-dev": ("FluxTransformer2DModel", _FLUX_DEV),
}

VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_FLOW_VAE = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_VAES: dict[str, dict[str, Any]] = {
    "sd15": {"scaling_factor": 0.18215, "force_upcast": False},
    "sdxl": {"scaling_factor": 0.13025},
    "sd35-medium": {**_FLOW_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux-dev": {**_FLOW_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159},
}

_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}

_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_G = {
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


def architecture(
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    rank: int = 16,
    targets: str = "attention",
    adapter_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "meta",
) -> Any:
    """The sampler's view of a published model, with random or no weights.

    Args:
        name: one of NAMES.
        dtype: of the frozen weights.
        rank: of the LoRA adapters.
        targets: the layers that have adapters, of `lora_targets.TARGETS`.
        adapter_dtype: torch.float32 or torch.bfloat16.
        device: "meta" has shapes and no storage; elsewhere weights are random.

    Raises:
        ValueError: an unknown name, or unknown targets.
    """
    from alignprop_fast.models import adapt
    from alignprop_fast.models.lora import add_lora

    if name not in NAMES:
        raise ValueError(f"unknown architecture {name!r}: use {', '.join(NAMES)}")
    with torch.device(device), _default_dtype(dtype):
        pipe = _BUILDERS[name](name)
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        for parameter in add_lora(pipe, rank, rank, targets):
            parameter.data = parameter.data.to(adapter_dtype)
    return adapt(pipe)


def parameters(adapter: Any) -> dict[str, int]:
    """How many parameters: frozen in the denoiser, trained in its adapters, in the VAE and in the text encoders."""
    denoiser = list(adapter.denoiser.parameters())
    trained = _count(p for p in denoiser if p.requires_grad)
    vae = _count(adapter.pipe.vae.parameters())
    everything = _count(p for module in adapter.modules() for p in module.parameters())
    return {
        "denoiser": _count(denoiser) - trained,
        "adapters": trained,
        "vae": vae,
        "text": everything - vae - _count(denoiser),
    }


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _denoiser(name: str) -> nn.Module:
    import diffusers

    class_name, config = _DENOISERS[name]
    return getattr(diffusers, class_name)(**config)


def _vae(name: str) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE, **_VAES[name])


def _clip(config: dict[str, Any], projected: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(vocab_size=49408, **config))


def _stable_diffusion(name: str) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    parts = {
        "vae": _vae(name),
        "unet": _denoiser(name),
        "scheduler": DDIMScheduler(**_DIFFUSION),
        "text_encoder": _clip(_CLIP_L, projected=False),
        "tokenizer": None,
    }
    if name == "sdxl":
        second = _clip(_CLIP_G, projected=True)
        return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=None, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**_T5_XXL))


def _stable_diffusion_3(name: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=_denoiser(name),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(name),
        text_encoder=_clip(_CLIP_L, projected=True),
        tokenizer=None,
        text_encoder_2=_clip(_CLIP_G, projected=True),
        tokenizer_2=None,
        text_encoder_3=_t5(),
        tokenizer_3=None,
    )


def _flux(name: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
        ),
        vae=_vae(name),
        text_encoder=_clip(_CLIP_L, projected=False),
        tokenizer=None,
        text_encoder_2=_t5(),
        tokenizer_2=None,
        transformer=_denoiser(name),
    )


_BUILDERS: dict[str, Callable[[str], Any]] = {
    "sd15": _stable_diffusion,
    "sdxl": _stable_diffusion,
    "sd35-medium": _stable_diffusion_3,
    "flux-dev": _flux,
}
_TEXT_ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "clip-l": lambda: _clip(_CLIP_L, projected=True),
    "clip-g": lambda: _clip(_CLIP_G, projected=True),
    "t5-xxl": _t5,
}


@functools.cache
def published_layers(name: str) -> Mapping[str, tuple[int, ...]]:
    """`layers` of a published network: the denoiser of a model, or a text encoder. In a fraction of a second."""
    with torch.device("meta"):
        return layers(_TEXT_ENCODERS[name]() if name in _TEXT_ENCODERS else _denoiser(name))


def layers(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The linear layers and convolutions of a network, with PEFT's adapters or without: {path: shape of the weight}."""
    return {
        path.removeprefix("base_model.model.").removesuffix(".base_layer"): tuple(module.weight.shape)
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in path
    }
