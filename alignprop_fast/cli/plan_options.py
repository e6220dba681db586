"""The options of `plan`: those of `train` that change a plan, and the GPU, the table and the files that are its own."""

from __future__ import annotations

from dataclasses import dataclass

from alignprop_fast.training.declaration import Command, Panel, like, option
from alignprop_fast.training.options import InputOptions, TrainOptions
from alignprop_fast.training.trainer_options import TrainerOptions


@dataclass
class PlanOptions(TrainOptions):
    """A run that is planned: what of a run changes its plan, and what of a GPU."""

    model: str = like(
        InputOptions,
        "model",
        help="sd15, sdxl, sd35-medium or flux-dev: the published architecture, no weights needed; a folder in the "
        "diffusers format, of which the configuration files are enough; a Hub id (owner/name); or demo.",
    )
    resolution: int | None = option(
        None, "Height and width in pixels.", Panel.SAMPLING, commands=Command.PLAN, shown="the model's own", at_least=8
    )
    memory_budget: int | str | None = like(
        TrainerOptions,
        "memory_budget",
        help="What tensors may take on the device in all, weights included, such as 24GiB; auto: all of the GPU's "
        "memory but what CUDA itself takes, with --measure what is free.",
    )
    gpu: str | None = option(
        None,
        "GPU to plan for, which need not be here, such as 'RTX 4090' or 'A100 80GB'.",
        Panel.DEVICE,
        commands=Command.PLAN,
        shown="the one that is here",
    )
    measure: bool = option(
        False,
        "Load the model with its weights and measure on the device that is here instead of estimating.",
        Panel.ESTIMATE,
        commands=Command.PLAN,
    )
    table: str | None = option(
        None,
        "Plan from a cost table that --save-table wrote, without the model.",
        Panel.ESTIMATE,
        commands=Command.PLAN,
    )
    save_table: str | None = option(
        None, "Write the cost table to this JSON file.", Panel.OUTPUT, commands=Command.PLAN
    )
    json: str | None = option(None, "Write the plan and its numbers to this file.", Panel.OUTPUT, commands=Command.PLAN)
