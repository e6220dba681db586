"""Where training runs and writes: accelerate's set-up and the output folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from alignprop_fast.config import AlignPropConfig
from alignprop_fast.processes import MeetingAccelerator, start_processes


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
    if config.deterministic and torch.cuda.is_available() and not options.get("cpu"):
        make_deterministic()
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


def make_deterministic() -> None:
    """Let this process compute the same bits from run to run on a GPU; to be called before anything runs there.

    Raises:
        ValueError: cuBLAS has started without the workspaces that this takes.
    """
    if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        if torch.cuda.is_initialized():
            raise ValueError("deterministic comes too late: set CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts")
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # The package's kernels write all of what they allocate.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _tracker_config(config: AlignPropConfig) -> dict[str, Any]:
    """The options as a tracker takes them; TensorBoard's table of hyperparameters knows numbers and texts only."""
    options = config.to_dict()
    if config.log_with != "tensorboard":
        return {"alignprop_trainer_config": options}
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}
