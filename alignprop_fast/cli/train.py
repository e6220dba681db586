"""The command `train`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.options import command_line
from alignprop_fast.cli.screen import make_console
from alignprop_fast.cli.support import go_on_by, process_count, quiet_libraries, run_errors, setup_errors
from alignprop_fast.training.declaration import Command, Panel, option
from alignprop_fast.training.options import TrainOptions

if TYPE_CHECKING:
    from alignprop_fast.cli.session import Session
    from alignprop_fast.report.pictures import Pictures


@dataclass
class TrainCall(TrainOptions):
    """The options of `train` that are not part of the run: sources of options and of adapters."""

    resume: bool = option(
        False, "Continue from the newest checkpoint in --output-dir, with that run's options.", Panel.OUTPUT
    )
    resume_from: str | None = option(
        None, "Continue from this checkpoint folder instead, for example if the newest is damaged.", Panel.OUTPUT
    )
    config: str | None = option(
        None, "YAML file of options, one per line such as 'batch_size: 4'. The command line overrides it.", Panel.OUTPUT
    )

    def run(self) -> TrainOptions:
        return TrainOptions(**{each.name: getattr(self, each.name) for each in fields(TrainOptions)})


@command_line(Command.TRAIN, TrainCall())
def train(ctx: typer.Context, options: TrainCall) -> None:
    """Fine-tune LoRA adapters by the gradient of a reward.

    Writes pytorch_lora_weights.safetensors (for diffusers' load_lora_weights), kohya_lora_weights.safetensors (for
    ComfyUI and others), before_after.png, reward.png, README.md (a model card), samples/, metrics.jsonl, checkpoints/,
    config.yaml and versions.json to --output-dir. Ctrl-C and SIGTERM save a checkpoint.

    **Examples**

    - `alignprop-fast train --reward colorfulness --num-inference-steps 12 --output-dir colourful`
    - `alignprop-fast train --model path/to/sd15 --reward-model path/to/clip --prompts animals --memory-budget 24GiB`
    - `alignprop-fast train --reward colorfulness --watch-reward clip --patience 2 --max-drop 0.02 --output-dir held`
    - `alignprop-fast train --resume --output-dir colourful`
    - `accelerate launch --num-processes 4 -m alignprop_fast train --model path/to/sd15 --prompts animals` (four GPUs)
    """
    console, folder = make_console(), ctx.with_resource(OutputFolder(options.output_dir, several=True))
    with setup_errors():
        if process_count() == 1:  # several processes must meet first, and then print it once
            folder.check()
        quiet_libraries(console)
        from alignprop_fast.cli.set_up import Start, set_up

        session = set_up(options.run(), console, folder, Start(options.resume, options.resume_from))
    start = session.trainer.steps_done
    what = f"{session.options.model} on {session.options.reward}"
    console.print(f"training {what}, step {start} of {options.steps}", soft_wrap=True)
    _print_plan(console, session)
    with run_errors(session.folder, go_on_by(session.folder)):
        session.run()
    if session.is_main:
        print_results(console, session.folder, {"sample prompts": (session.before, session.after)})
        if session.averaged is not None:
            console.print(f"average:  {session.averaged}; the pictures were drawn with it", soft_wrap=True)
        _print_peak(console, session)


def _print_plan(console: Console, session: Session) -> None:
    from alignprop_fast.cli.plan_summary import print_prediction

    if session.prediction is None:
        hint = "every gradient step runs again in the backward pass; --memory-budget SIZE saves time"
        console.print(f"no memory budget: {hint}, and alignprop-fast plan predicts how much", soft_wrap=True)
        return
    if session.options.memory_budget == "auto":
        console.print(session.trainer.sampler.budget_note, soft_wrap=True)
    print_prediction(console, session.prediction)


def _print_peak(console: Console, session: Session) -> None:
    """Print the measured peak beside the predicted one, if both are known."""
    from alignprop_fast.planner import format_bytes

    if session.prediction is None or not session.peak_bytes:
        return
    predicted, measured = session.prediction.worst.peak_bytes, format_bytes(session.peak_bytes)
    line = f"peak:     predicted {format_bytes(predicted)} in the worst case, measured {measured}"
    if session.trainer.accelerator.device.type != "cuda":
        line = (
            f"peak:     predicted {format_bytes(predicted)} of tensors in the worst case; the process took {measured} "
            "with its libraries (on the CPU only this can be measured)"
        )
    console.print(line, soft_wrap=True)


def print_results(console: Console, folder: Path, rows: dict[str, tuple[Pictures, Pictures]]) -> None:
    """Print a small table of mean rewards (and of their parts) before and after, and the paths of the results."""
    table = Table("mean over", "", "before", "after", "change")
    for name, (before, after) in rows.items():
        values = {"reward": (before.mean_reward, after.mean_reward)}
        if len(after.mean_parts) > 1:
            values |= {part: (before.mean_parts[part], after.mean_parts[part]) for part in after.mean_parts}
        for label, (first, second) in values.items():
            where = f"{len(after.images)} pictures, {name}" if label == "reward" else ""
            table.add_row(where, label, f"{first:.3f}", f"{second:.3f}", f"{second - first:+.3f}")
    console.print(table)
    console.print(f"pictures: {folder / 'before_after.png'}\ncurve:    {folder / 'reward.png'}", soft_wrap=True)
    console.print(f"adapters: {folder / 'pytorch_lora_weights.safetensors'}", soft_wrap=True)
    console.print(f"          {folder / 'kohya_lora_weights.safetensors'} for ComfyUI and others", soft_wrap=True)
