"""Where and in which precision training runs: accelerate's set-up, the model's devices and dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from alignprop_fast.config import AlignPropConfig
from alignprop_fast.processes import MeetingAccelerator, start_processes

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def checkpoint_root(config: AlignPropConfig) -> Path:
    """The folder that checkpoints go into: `checkpoints/` in output_dir, else project_dir, else logdir."""
    return output_folder(config) / "checkpoints"


def output_folder(config: AlignPropConfig) -> Path:
    return Path(config.output_dir or config.project_kwargs.get("project_dir") or config.logdir).expanduser()


def make_accelerator(config: AlignPropConfig) -> Accelerator:
    """An Accelerator after the config, its tracker started.

    Raises:
        ValueError: fp16 without a GPU.
    """
    options = dict(config.accelerator_kwargs)
    state = start_processes(bool(options.get("cpu")), options)
    if config.mixed_precision == "fp16" and state.device.type == "cpu":
        raise ValueError('mixed_precision="fp16" needs a GPU: use "no" (fp32) or "bf16"')
    accelerator = MeetingAccelerator(
        log_with=config.log_with,
        mixed_precision="no" if config.mixed_precision == "none" else config.mixed_precision,
        project_config=ProjectConfiguration(**{"logging_dir": config.logdir, **config.project_kwargs}),
        gradient_accumulation_steps=config.train_gradient_accumulation_steps,
        **options,
    )
    if accelerator.is_main_process:
        accelerator.init_trackers(
            config.tracker_project_name, config=_tracker_config(config), init_kwargs=config.tracker_kwargs
        )
    return accelerator


def _tracker_config(config: AlignPropConfig) -> dict[str, Any]:
    """The options as a tracker takes them; TensorBoard's table of hyperparameters knows numbers and texts only."""
    options = config.to_dict()
    if config.log_with != "tensorboard":
        return {"alignprop_trainer_config": options}
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}


def place_model(pipeline: Any, accelerator: Accelerator, config: AlignPropConfig) -> None:
    """Move the pipeline's modules to the device; frozen weights take the mixed precision's dtype, or are quantised.

    A UNet that is trained whole stays in fp32 and runs under autocast: gradient scaling needs fp32 gradients. A VAE
    that says it overflows in fp16 (`force_upcast`, SDXL) stays in fp32 beside fp16.
    """
    device, dtype = accelerator.device, _DTYPES.get(accelerator.mixed_precision, torch.float32)
    overflows = dtype is torch.float16 and pipeline.vae.config.get("force_upcast", False)
    for encoder in pipeline.text_encoders:
        _move(encoder, device, dtype)
    _move(pipeline.vae, device, torch.float32 if overflows else dtype)
    if config.base_dtype != "auto":
        pipeline.quantize_base(config.base_dtype, device, dtype)
    _move(pipeline.unet, device, dtype if pipeline.use_lora else torch.float32)
    if config.allow_tf32 and device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True


def _move(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    # diffusers warns of every cast, also where there is nothing to cast.
    if any(parameter.dtype != dtype for parameter in module.parameters()):
        module.to(dtype=dtype)
    module.to(device)
