"""Sets up a run: reads and checks all input, and draws the first pictures, before anything is written."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.options import make_config
from alignprop_fast.cli.parts import Rewards, make_stopping, open_model, open_rewards, resolved, tell_sampler
from alignprop_fast.cli.plan_summary import Prediction, predict
from alignprop_fast.cli.results import check_adapters
from alignprop_fast.cli.screen import say_measured
from alignprop_fast.cli.session import Session
from alignprop_fast.cli.support import (
    budget_here,
    check_tracker,
    existing_as_absolute,
    go_on_by,
    pick_device,
    process_count,
)
from alignprop_fast.demo import BUNDLED
from alignprop_fast.prompts.rows import PROMPT_SETS, PromptRow, load_rows
from alignprop_fast.training.options import TrainOptions

if TYPE_CHECKING:
    from alignprop_fast.evaluation.early_stopping import EarlyStopping
    from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
    from alignprop_fast.training.config import AlignPropConfig
    from alignprop_fast.training.trainer import AlignPropTrainer

MOST_AHEAD = 1000  # prompts that are encoded at the start; further ones are encoded when needed
_OURS = ("config.yaml", "metrics.jsonl", "samples", "checkpoints", "pytorch_lora_weights.safetensors", "reward.png")


@dataclass(frozen=True)
class Start:
    """Where a run starts. resume: from the newest checkpoint in its folder. resume_from: from this checkpoint."""

    resume: bool = False
    resume_from: str | None = None

    @property
    def is_new(self) -> bool:
        return not self.resume and self.resume_from is None

    def checkpoint(self, folder: Path) -> str:
        """The trainer's `resume_from`; "" if the run was killed before its first checkpoint and so starts again."""
        from alignprop_fast.training.checkpoint import checkpoints

        if self.resume_from is not None:
            return self.resume_from
        return str(folder) if self.resume and checkpoints(folder / "checkpoints") else ""


@dataclass(frozen=True)
class Input:
    """The user's input, read and checked. options: with full paths, and `auto` replaced by what it stands for."""

    options: TrainOptions
    config: AlignPropConfig
    rows: list[PromptRow]


def set_up(options: TrainOptions, console: Console, taken: OutputFolder, start: Start | None = None) -> Session:
    """A run whose first pictures are drawn. If there are several processes (`accelerate launch`), each sets it up.

    Raises:
        ValueError, OSError: bad input, one line each.
    """
    session = open_session(options, console, taken, start or Start())
    session.draw_first()
    return session


def open_session(options: TrainOptions, console: Console, taken: OutputFolder, start: Start) -> Session:
    """The run before its first pictures are drawn."""
    device, precision = _choose_device(options, console)
    given = _read_input(options, device, precision, console, taken, start)
    options, rows = given.options, given.rows
    rewards, stopping = open_rewards(options, device), make_stopping(options)
    pipeline = open_model(options, device)
    _check_reward(options, rewards, rows[0], pipeline.sd_pipeline, device)
    trainer = _make_trainer(given, rewards, stopping, pipeline)
    check_adapters(pipeline.sd_pipeline)
    tell_sampler(trainer.sampler, rewards, rows[0])
    _read_prompts(trainer, options, rows, rewards)
    prediction = _predict(trainer, options, console)
    return Session(console, taken, options, rows, rewards, stopping, trainer, prediction)


def _choose_device(options: TrainOptions, console: Console) -> tuple[str, str]:
    """Choose the device of this process and its precision, and connect the processes."""
    import torch

    from alignprop_fast.training.launcher import read_launcher
    from alignprop_fast.training.placement import make_deterministic
    from alignprop_fast.training.processes import start_processes

    launcher = read_launcher()
    wanted, of_device = launcher.choose_device(options.device)
    if options.deterministic and wanted != "cpu" and torch.cuda.is_available():
        make_deterministic()  # before CUDA starts, which happens when a device is made the current one
    device = pick_device(wanted)
    default = "no" if device == "cpu" else "bf16"
    precision, of_precision = launcher.choose_precision(options.mixed_precision, default)
    for line in filter(None, (of_device, of_precision)):
        console.print(line, soft_wrap=True)
    processes = start_processes(cpu=device == "cpu")
    if processes.num_processes != process_count():  # each would be its own run, all in one folder
        raise ValueError(
            f"the launcher started {process_count()} processes, but accelerate sees {processes.num_processes}: "
            "use accelerate launch or torchrun"
        )
    return device, precision


def _read_input(
    options: TrainOptions, device: str, precision: str, console: Console, taken: OutputFolder, start: Start
) -> Input:
    from alignprop_fast.training.processes import main_process_first

    folder = taken.path.resolve()
    with main_process_first():  # an error that all processes have is printed once
        taken.check()
        if start.is_new:
            _check_unused(folder)
        rows = load_rows(options.prompts)
        check_tracker(options.log_with)
        options = _with_whole_paths(resolved(options, precision), folder)
        config = make_config(options, device, start.checkpoint(folder))
        return _held_to_device(Input(options, config, rows), device, console)


def _check_unused(folder: Path) -> None:
    if used := [name for name in _OURS if (folder / name).exists()]:
        raise ValueError(
            f"{folder} holds an earlier run ({used[0]}): {go_on_by(folder)}, or choose another --output-dir"
        )


def _with_whole_paths(options: TrainOptions, folder: Path) -> TrainOptions:
    """Make paths absolute, so that the run can be resumed from another folder."""
    return replace(
        options,
        output_dir=str(folder),
        model=existing_as_absolute(options.model, names=BUNDLED),
        model_config=None if options.model_config is None else existing_as_absolute(options.model_config),
        prompts=existing_as_absolute(options.prompts, PROMPT_SETS),
        reward_model=tuple(map(_absolute_model, options.reward_model)),
        watch_prompts=options.watch_prompts and existing_as_absolute(options.watch_prompts, PROMPT_SETS),
        watch_reward_model=tuple(map(_absolute_model, options.watch_reward_model)),
        diversity_model=options.diversity_model and existing_as_absolute(options.diversity_model),
    )


def _absolute_model(value: str) -> str:
    from alignprop_fast.rewards.registry import split_model

    name, path = split_model(value)
    return existing_as_absolute(path) if name is None else f"{name}={existing_as_absolute(path)}"


def _held_to_device(given: Input, device: str, console: Console) -> Input:
    """Reduces the budget to what the device has; prints a line if that is less than was asked for."""
    budget = given.config.memory_budget
    if not isinstance(budget, int):
        return given
    _, budget_bytes, note = budget_here(budget, device)
    if not note:
        return given
    console.print(note, soft_wrap=True)
    config = replace(given.config, memory_budget=budget_bytes)
    return replace(given, options=replace(given.options, memory_budget=budget_bytes), config=config)


def _check_reward(options: TrainOptions, rewards: Rewards, first: PromptRow, pipe: Any, device: str) -> None:
    """Score a grey batch, so that a reward without gradient is refused before anything is written.

    Call it before the trainer seeds or restores random numbers, because a reward may draw some.
    """
    import torch

    from alignprop_fast.models.picture_size import picture_size

    count = options.batch_size
    height, width = picture_size(pipe, options.height, options.width)
    images_BCHW = torch.full((count, 3, height, width), 0.5, device=device, requires_grad=True)
    rewards.reward(images_BCHW, [first.prompt] * count, [dict(first.metadata) for _ in range(count)])


def _make_trainer(
    given: Input,
    rewards: Rewards,
    stopping: EarlyStopping | None,
    pipeline: DefaultDDPOStableDiffusionPipeline,
) -> AlignPropTrainer:
    from alignprop_fast.training.trainer import AlignPropTrainer

    owners: dict[str, Any] = {"stopping": stopping, "rewards": rewards.normalised}
    return AlignPropTrainer(
        given.config,
        rewards.trained,
        partial(_draw_prompt, given.rows),
        pipeline,
        stateful={name: owner for name, owner in owners.items() if owner is not None},
    )


def _draw_prompt(rows: Sequence[PromptRow]) -> tuple[str, dict[str, Any]]:
    row = random.choice(rows)
    return row.prompt, dict(row.metadata)


def _read_prompts(trainer: AlignPropTrainer, options: TrainOptions, rows: list[PromptRow], rewards: Rewards) -> None:
    """Log what the text encoders cut off, and encode the known prompts."""
    prompts = [row.prompt for row in rows]
    watched = [] if rewards.watch is None else [task.prompt for task in rewards.watch.tasks]
    trainer.sampler.say_what_is_cut([*prompts, *watched], options.negative_prompt)
    trainer.sampler.encode_ahead(prompts[:MOST_AHEAD], options.negative_prompt)


def _predict(trainer: AlignPropTrainer, options: TrainOptions, console: Console) -> Prediction | None:
    """The plan of a training step; None without a budget. A budget that is too small is refused before anything is
    written."""
    sampler, start = trainer.sampler, time.perf_counter()
    with trainer.autocast():  # as in training steps
        budget_bytes = sampler.settled_budget(options.batch_size, options.negative_prompt)
        if budget_bytes is None:
            return None
        table = sampler.solver(options.batch_size, options.negative_prompt).table
    seconds = time.perf_counter() - start
    found = predict(table, trainer.config.sample_num_steps, options.truncation, options.batch_size, budget_bytes)
    say_measured(console, seconds)
    return found
