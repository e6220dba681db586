"""The command `plan`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.options import command_line, given
from alignprop_fast.cli.screen import make_console
from alignprop_fast.cli.support import check_writable, quiet_libraries, run_errors, setup_errors
from alignprop_fast.training.declaration import Command, Panel, like, option
from alignprop_fast.training.options import InputOptions, TrainerOptions, TrainOptions


@dataclass
class PlanOptions(TrainOptions):
    """A run that is planned: what of a run changes its plan, and what of a GPU."""

    model: str = like(
        InputOptions,
        "model",
        help="sd15 or sdxl: the published architecture, no weights needed; a folder in the diffusers format, of which "
        "the configuration files are enough; a Hub id (owner/name); or demo.",
    )
    resolution: int | None = option(
        None,
        "Height and width in pixels.",
        panel=Panel.SAMPLING,
        commands=Command.PLAN,
        shown="the model's own",
        at_least=8,
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
        panel=Panel.DEVICE,
        commands=Command.PLAN,
        shown="the one that is here",
    )
    measure: bool = option(
        False,
        "Load the model with its weights and measure on the device that is here instead of estimating.",
        panel=Panel.ESTIMATE,
        commands=Command.PLAN,
    )
    table: str | None = option(
        None,
        "Plan from a cost table that --save-table wrote, without the model.",
        panel=Panel.ESTIMATE,
        commands=Command.PLAN,
    )
    save_table: str | None = option(
        None, "Write the cost table to this JSON file.", panel=Panel.OUTPUT, commands=Command.PLAN
    )
    json: str | None = option(
        None, "Write the plan and its numbers to this file.", panel=Panel.OUTPUT, commands=Command.PLAN
    )


@command_line(Command.PLAN, PlanOptions(output_dir="alignprop-plan"))
def plan(ctx: typer.Context, options: PlanOptions) -> None:
    """Say what fits a memory budget, and how fast a training step will be: without weights, and on any GPU.

    Takes the options of train. The budget holds for the worst case of --truncation, however many steps carry gradient;
    the time is given for the mean as well. Writes plan.png, memory over the training step, to --output-dir. Exit code 2
    and one line with the least budget where nothing fits.

    Estimates count every operator on tensors without data, and time it by the GPU's data sheet.

    **Examples**

    - `alignprop-fast plan --model sdxl --gpu "RTX 4090" --reward hpsv2 --batch-size 1`
    - `alignprop-fast plan --model sd15 --gpu "RTX 3060" --memory-budget 10GiB --truncation last:1 --json plan.json`
    """
    console, folder = make_console(), ctx.with_resource(OutputFolder(options.output_dir))
    with setup_errors():
        from alignprop_fast.cli.plan_question import from_model, from_table
        from alignprop_fast.cli.plan_summary import print_prediction, write_json
        from alignprop_fast.planner import save_table as write_table
        from alignprop_fast.report.plan import plot_plan

        files = [Path(name).expanduser() for name in (options.save_table, options.json) if name is not None]
        folder.check()
        for file in files:
            check_writable(file.parent)
        quiet_libraries(console)
        asked = asdict(options)
        question = from_model(console, asked) if options.table is None else from_table(asked, given(ctx))
        prediction = question.predict()
    if question.note:
        console.print(question.note, soft_wrap=True)
    console.print(question.title, soft_wrap=True)
    print_prediction(console, prediction)
    folder.begin()
    with run_errors(folder.path, "start again"):
        plot_plan(folder.path / "plan.png", prediction.table, prediction.worst, question.title)
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        if options.save_table is not None:
            write_table(prediction.table, Path(options.save_table).expanduser())
        if options.json is not None:
            write_json(Path(options.json).expanduser(), prediction, question.facts)
    console.print(f"picture: {folder.path / 'plan.png'}", soft_wrap=True)
