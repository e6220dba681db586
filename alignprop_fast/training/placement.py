"""Where training runs and writes: accelerate's set-up and the output folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from alignprop_fast.training.config import AlignPropConfig
from alignprop_fast.training.launcher import checked_arguments, read_launcher
from alignprop_fast.training.processes import start_processes

logger = logging.getLogger(__name__)

_CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS is deterministic, by its documentation


def checkpoint_root(config: AlignPropConfig) -> Path:
    """The folder that checkpoints go into: `checkpoints/` in output_dir, else project_dir, else logdir."""
    return output_folder(config) / "checkpoints"


def output_folder(config: AlignPropConfig) -> Path:
    return Path(config.output_dir or config.project_kwargs.get("project_dir") or config.logdir).expanduser()


def make_accelerator(config: AlignPropConfig) -> Accelerator:
    """An Accelerator as the config says, with its tracker started. See `launcher` for what the environment may say.

    Raises:
        ValueError: fp16 without a GPU, or an environment or accelerator_kwargs that cannot be followed.
    """
    precision, steps = config.mixed_precision.replace("none", "no"), config.train_gradient_accumulation_steps
    options, launcher = checked_arguments(config.accelerator_kwargs, steps), read_launcher()
    device, of_device = launcher.choose_device("cpu" if "cpu" in options else "auto")
    if "cpu" in config.accelerator_kwargs and device != "cpu":  # by the command line, which has printed why
        of_device = ""
    options["cpu"] = device == "cpu"
    if config.deterministic and torch.cuda.is_available() and not options["cpu"]:
        make_deterministic()
    state = start_processes(options["cpu"], options)
    if precision == "fp16" and state.device.type == "cpu":
        raise ValueError('mixed_precision="fp16" needs a GPU: use "no" (fp32) or "bf16"')
    accelerator = Accelerator(
        log_with=config.log_with,
        mixed_precision=precision,
        project_config=ProjectConfiguration(**{"logging_dir": config.logdir, **config.project_kwargs}),
        # The environment would override a plain number of steps.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps),
        **options,
    )
    if accelerator.is_main_process:
        _, of_precision = launcher.choose_precision(precision, precision)
        for line in filter(None, (of_device, of_precision, launcher.compare_accumulation(steps))):
            logger.warning(line)
        accelerator.init_trackers(
            config.tracker_project_name, config=_tracker_config(config), init_kwargs=config.tracker_kwargs
        )
    return accelerator


def make_deterministic() -> None:
    """Let this process compute the same bits from run to run on a GPU. Call it before anything runs there.

    Raises:
        ValueError: cuBLAS has started without the workspaces that it needs for this, or the environment sets others.
    """
    workspaces = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if workspaces is not None and workspaces not in _CUBLAS_WORKSPACES:
        raise ValueError(f"CUBLAS_WORKSPACE_CONFIG={workspaces} is not deterministic: use :4096:8, or unset it")
    if workspaces is None:
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
