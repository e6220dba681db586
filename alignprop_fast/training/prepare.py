"""Makes a loaded pipeline ready to train: devices, dtypes, adapters, and the sampler with all that a plan counts.

`AlignPropTrainer` does this on a device. The command `plan` does it also on the meta device, whose tensors have no
data. This module decides for both what is on the device, in which precision and with which options.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.models.casting import cast_weights
from alignprop_fast.planner.optimizer_state import average_bytes, merges, optimizer_bytes
from alignprop_fast.training.config import AlignPropConfig

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def compute_dtype(config: AlignPropConfig) -> torch.dtype:
    """The dtype in which the networks compute."""
    return _DTYPES.get(config.mixed_precision, torch.float32)


def prepare_model(pipeline: Any, device: torch.device, config: AlignPropConfig) -> list[nn.Parameter]:
    """Place the pipeline and make its denoiser trainable; returns the trainable parameters, in their dtype.

    pipeline: a `DefaultDDPOStableDiffusionPipeline`.

    Raises:
        ValueError: bf16 adapters are asked for but the whole denoiser is trained, the base model cannot be quantised,
            or the user switched on something in the pipeline that the chain does not support.
    """
    if config.adapter_dtype == "bf16" and not pipeline.use_lora:
        raise ValueError('adapter_dtype="bf16" is for adapters, but the whole denoiser is trained: use fp32')
    pipeline.check_switches()  # before anything is done to it
    place_model(pipeline, device, config)
    denoiser = pipeline.get_trainable_layers(config.lora_rank, config.lora_alpha, config.lora_targets)
    denoiser.train()
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    if config.adapter_dtype == "bf16":
        for parameter in trained:
            parameter.data = parameter.data.to(torch.bfloat16)
            parameter.grad_dtype = torch.float32  # see `FlatParameters`
    return trained


def make_sampler(pipeline: Any, config: AlignPropConfig, reward: Any) -> DifferentiableSampler:
    """The sampler of a prepared pipeline, which counts the memory of the reward and the optimizer in its plans.

    Raises:
        ValueError: as `DifferentiableSampler`, or CUDA graphs are asked for with the whole denoiser under autocast, or
            parameters of a text encoder or the VAE require grad.
    """
    if config.cuda_graphs == "on" and not pipeline.use_lora and config.mixed_precision in _DTYPES:
        raise ValueError("cuda_graphs='on' does not support a denoiser under autocast: train adapters, or leave it out")
    shapes = [p.shape for p in pipeline.unet.parameters() if p.requires_grad]
    merged = pipeline.use_lora and merges(config.optimizer)
    update_bytes = optimizer_bytes(config.optimizer, shapes, merged)
    if config.ema_decay:
        update_bytes += average_bytes(shapes)
    sampler = DifferentiableSampler(
        pipeline.sd_pipeline,
        config.sample_num_steps,
        config.sample_guidance_scale,
        config.sample_eta,
        config.memory_budget,
        guidance_rescale=config.guidance_rescale,
        true_cfg_scale=config.true_cfg_scale,
        cfg_normalization=config.cfg_normalization,
        cfg_truncation=config.cfg_truncation,
        height=config.height,
        width=config.width,
        draw_unused_noise=True,
        reward=reward,
        cache_text=config.cache_text,
        optimizer_bytes=update_bytes,
        host_memory=config.host_memory,
        compare_with_base=config.kl_weight > 0,
        cuda_graphs=config.cuda_graphs,
        compiled=config.compiled,
        sampling_precision=config.sampling_precision,
    )
    if sampler.model.text_learns() or sampler.model.decoder_learns():
        raise ValueError(
            "the trainer trains only the denoiser, but a text encoder or the VAE requires grad: call its "
            "requires_grad_(False), or train it with DifferentiableSampler and a loop of your own"
        )
    return sampler


def place_model(pipeline: Any, device: torch.device, config: AlignPropConfig) -> None:
    """Move the pipeline's modules to the device; frozen weights take the mixed precision's dtype, or are quantised.

    A denoiser that is trained whole stays in fp32 and runs under autocast, because gradient scaling needs fp32
    gradients. With fp16, a VAE that declares that it overflows in fp16 (`force_upcast`, SDXL) stays in fp32. With
    `cache_text` the text encoders stay on the CPU and move to the device only to encode. On the meta device nothing is
    encoded, so they stay there. Weights that their class keeps in fp32 stay so.
    """
    dtype = compute_dtype(config)
    encoders_device = torch.device("cpu") if config.cache_text and device.type != "meta" else device
    overflows = dtype is torch.float16 and pipeline.vae.config.get("force_upcast", False)
    for encoder in pipeline.text_encoders:
        _move(encoder, encoders_device, dtype)
    _move(pipeline.vae, device, torch.float32 if overflows else dtype)
    if config.base_dtype == "auto":
        _move(pipeline.unet, device, dtype if pipeline.use_lora else torch.float32)
    else:
        pipeline.quantize_base(config.base_dtype, device, dtype)
        pipeline.unet.to(device)  # without another cast, which would round the scales
    if device.type == "cuda":  # undoes TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which some images set
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32


def _move(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    cast_weights(module, dtype)
    module.to(device)
