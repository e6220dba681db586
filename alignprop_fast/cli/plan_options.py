"""The options of `plan`: those of `train` that change a plan, and its own for the GPU, the table and files."""

from __future__ import annotations

from dataclasses import dataclass

from alignprop_fast.training.declaration import Command, Panel, like, option
from alignprop_fast.training.options import InputOptions, TrainOptions
from alignprop_fast.training.trainer_options import TrainerOptions


@dataclass
class PlanOptions(TrainOptions):
    """A run to plan: the options that change its plan, and the GPU."""

    model: str = like(
        InputOptions,
        "model",
        help="sd15, sdxl, sd35-medium, flux-dev, chroma, z-image, z-image-turbo, flux2-klein-4b, flux2-klein-9b, "
        "flux2-dev, qwen-image, krea2, lumina2 or sana: the published architecture, no weights needed; a folder in the "
        "diffusers format, whose configuration files are enough; a Hub id (owner/name); or demo.",
    )
    resolution: int | None = option(
        None, "Height and width in pixels.", Panel.SAMPLING, commands=Command.PLAN, shown="the model's own", at_least=8
    )
    memory_budget: int | str | None = like(
        TrainerOptions,
        "memory_budget",
        help="Memory that tensors may take on the device, weights included, such as 24GiB. auto: all of the GPU's "
        "memory except what CUDA takes; with --measure, what is free.",
    )
    gpu: str | None = option(
        None,
        "GPU to plan for, such as 'RTX 4090' or 'A100 80GB'; it need not be in this computer.",
        Panel.DEVICE,
        commands=Command.PLAN,
        shown="the one in this computer",
    )
    measure: bool = option(
        False,
        "Load the model with its weights and measure on this computer's device instead of estimating.",
        Panel.ESTIMATE,
        commands=Command.PLAN,
    )
    table: str | None = option(
        None,
        "Plan from a cost table written by --save-table, without the model.",
        Panel.ESTIMATE,
        commands=Command.PLAN,
    )
    save_table: str | None = option(
        None, "Write the cost table to this JSON file.", Panel.OUTPUT, commands=Command.PLAN
    )
    json: str | None = option(None, "Write the plan and its numbers to this file.", Panel.OUTPUT, commands=Command.PLAN)
