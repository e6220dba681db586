"""The command `plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.options import command_line, given
from alignprop_fast.cli.plan_options import PlanOptions
from alignprop_fast.cli.screen import make_console
from alignprop_fast.cli.support import check_writable, run_errors, setup_errors
from alignprop_fast.training.declaration import Command


@command_line(Command.PLAN, PlanOptions(output_dir="alignprop-plan"))
def plan(ctx: typer.Context, options: PlanOptions) -> None:
    """Predict what fits a memory budget and how fast a training step is: without weights, for any GPU.

    Takes the options of train. The budget holds for the most steps with gradient that --truncation can open; the time
    is also given for their mean number. Writes plan.png, memory over the training step, to --output-dir. If nothing
    fits, prints one line with the least budget and ends with exit code 2.

    An estimate counts every operator on tensors without data, and computes its time from the GPU's data sheet.

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
        if options.table is None:
            question = from_model(console, options)
        else:
            question = from_table(options, Path(options.table).expanduser(), given(ctx))
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
            origin = {**prediction.table.origin, "steps": str(question.num_steps)}  # of the next question, if not given
            write_table(replace(prediction.table, origin=origin), Path(options.save_table).expanduser())
        if options.json is not None:
            write_json(Path(options.json).expanduser(), prediction, question.facts)
    console.print(f"picture: {folder.path / 'plan.png'}", soft_wrap=True)
