"""The published models without their weights: the real architectures at full size, by name.

    adapter = architecture("sdxl")                   # on the meta device: shapes and bytes only; takes a second
    cond = adapter.blank_conditioning(batch=1, guided=True, size=adapter.image_size(None, None))
    x = adapter.initial_latents(1, adapter.image_size(None, None), None, None)
    y = adapter.predict(x, torch.tensor(500.0, device=adapter.device), cond)
    images = adapter.decode(x)
    parameters(adapter)                # {"denoiser": ..., "adapters": ..., "vae": ..., "text": ...}

`architecture` returns the same as `models.adapt` for a real pipeline of that kind: the same adapter class around the
same pipeline class, with LoRA adapters. Text encoders are present, because they count as weights. Tokenizers are not,
so use `blank_conditioning` instead of `encode`. With `device="cuda"` the weights are random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from alignprop_fast.models.casting import cast_weights
from alignprop_fast.models.classes import diffusers_class
from alignprop_fast.models.published import (
    CLIP_G,
    CLIP_L,
    clip_text,
    denoiser_network,
    gemma2_text,
    mistral3_text,
    qwen2_5_vl_text,
    qwen3_text,
    qwen3_vl_text,
    t5_text,
    vae_network,
)

_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
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
    """The sampler's view of a published model, with random weights or none.

    Args:
        name: one of NAMES.
        dtype: of the frozen weights.
        rank: of the LoRA adapters.
        targets: the layers that have adapters, one of `lora.targets.TARGETS`.
        adapter_dtype: torch.float32 or torch.bfloat16.
        device: "meta" has shapes and no storage; on other devices weights are random.

    Raises:
        ValueError: the name or the targets are unknown.
    """
    from alignprop_fast.models import adapt
    from alignprop_fast.models.lora.adapters import add_lora

    pipe = published_pipeline(name, dtype, device)
    with torch.device(device):
        for parameter in add_lora(pipe, rank, rank, targets):
            parameter.data = parameter.data.to(adapter_dtype)
    return adapt(pipe)


def published_pipeline(name: str, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "meta") -> Any:
    """The pipeline of a published model, frozen, with random or no weights. Arguments and errors: `architecture`."""
    if name not in NAMES:
        raise ValueError(f"unknown architecture {name!r}: use {', '.join(NAMES)}")
    with torch.device(device), _default_dtype(dtype):
        pipe = _BUILDERS[name](name)
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
                cast_weights(module, dtype)
    return pipe


def parameters(adapter: Any) -> dict[str, int]:
    """Numbers of parameters: frozen ones of the denoiser, its adapters', the VAE's and the text encoders'."""
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


def _stable_diffusion(name: str) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    parts = {
        "vae": vae_network(name),
        "unet": denoiser_network(name),
        "scheduler": DDIMScheduler(**_DIFFUSION),
        "text_encoder": clip_text(CLIP_L, projected=False),
        "tokenizer": None,
    }
    if name == "sdxl":
        second = clip_text(CLIP_G, projected=True)
        return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=None, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _stable_diffusion_3(name: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=denoiser_network(name),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae_network(name),
        text_encoder=clip_text(CLIP_L, projected=True),
        tokenizer=None,
        text_encoder_2=clip_text(CLIP_G, projected=True),
        tokenizer_2=None,
        text_encoder_3=t5_text(),
        tokenizer_3=None,
    )


def _flux(name: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
        ),
        vae=vae_network(name),
        text_encoder=clip_text(CLIP_L, projected=False),
        tokenizer=None,
        text_encoder_2=t5_text(),
        tokenizer_2=None,
        transformer=denoiser_network(name),
    )


def _chroma(name: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return diffusers_class("ChromaPipeline")(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae_network(name),
        text_encoder=t5_text(),
        tokenizer=None,
        transformer=denoiser_network(name),
    )


def _z_image(name: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return diffusers_class("ZImagePipeline")(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if name == "z-image-turbo" else 6.0),
        vae=vae_network("z-image"),
        text_encoder=qwen3_text(name),
        tokenizer=None,
        transformer=denoiser_network("z-image"),
    )


def _flux2_klein(name: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return diffusers_class("Flux2KleinPipeline")(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae_network(name),
        text_encoder=qwen3_text(name),
        tokenizer=None,
        transformer=denoiser_network(name),
        is_distilled=True,
    )


def _flux2_dev(name: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return diffusers_class("Flux2Pipeline")(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae_network(name),
        text_encoder=mistral3_text(),
        tokenizer=None,
        transformer=denoiser_network(name),
    )


def _qwen_image(name: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return diffusers_class("QwenImagePipeline")(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=vae_network(name),
        text_encoder=qwen2_5_vl_text(),
        tokenizer=None,
        transformer=denoiser_network(name),
    )


def _lumina2(name: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return diffusers_class("Lumina2Pipeline")(
        transformer=denoiser_network(name),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae_network(name),
        text_encoder=gemma2_text(),
        tokenizer=None,
    )


def _sana(name: str) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    with torch.device("cpu"):  # it copies its levels there
        scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return diffusers_class("SanaPipeline")(
        tokenizer=None,
        text_encoder=gemma2_text(),
        vae=vae_network(name),
        transformer=denoiser_network(name),
        scheduler=scheduler,
    )


def _krea2(name: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return diffusers_class("Krea2Pipeline")(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400
        ),
        vae=vae_network(name),
        text_encoder=qwen3_vl_text(),
        tokenizer=None,
        transformer=denoiser_network(name),
    )


_BUILDERS: dict[str, Callable[[str], Any]] = {
    "sd15": _stable_diffusion,
    "sdxl": _stable_diffusion,
    "sd35-medium": _stable_diffusion_3,
    "flux-dev": _flux,
    "chroma": _chroma,
    "z-image": _z_image,
    "z-image-turbo": _z_image,
    "flux2-klein-4b": _flux2_klein,
    "flux2-klein-9b": _flux2_klein,
    "flux2-dev": _flux2_dev,
    "qwen-image": _qwen_image,
    "krea2": _krea2,
    "lumina2": _lumina2,
    "sana": _sana,
}
NAMES = tuple(_BUILDERS)
