"""One training run, behind `train` and `demo`: set-up, loop, and what it leaves in its folder. No training logic.

config.yaml, versions.json      all options as resolved; versions of what computed
metrics.jsonl                   one line per optimizer step
samples/step_<n>.png, step_<n>/ the same prompts and seeds before, during and after; samples.jsonl: their rewards,
                                and what was watched
checkpoints/                    to resume from
reward.png, before_after.png, README.md (a model card)
plan.png                        memory over a training step, where a memory budget is given
pytorch_lora_weights.safetensors, kohya_lora_weights.safetensors
ema/                            their moving average, likewise, with --ema-decay; early stopping keeps it as the result
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import typer
import yaml
from PIL import Image
from rich.console import Console

from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.options import make_config
from alignprop_fast.cli.parts import make_stopping, open_model, open_rewards, resolved, tell_sampler
from alignprop_fast.cli.plan_summary import Prediction, predict
from alignprop_fast.cli.records import Records
from alignprop_fast.cli.results import AVERAGED, check_adapters, write_adapters, write_card
from alignprop_fast.cli.screen import Display
from alignprop_fast.cli.signals import Interrupt
from alignprop_fast.cli.support import (
    BY_SIGNAL,
    FAILED,
    budget_here,
    check_tracker,
    existing_as_absolute,
    fail,
    go_on_by,
    pick_device,
    process_count,
)
from alignprop_fast.files import write_whole
from alignprop_fast.planner import parse_budget
from alignprop_fast.prompts.rows import PROMPT_SETS, PromptRow, load_rows
from alignprop_fast.report.pictures import Pictures, save_before_after, to_images
from alignprop_fast.report.plan import plot_plan
from alignprop_fast.training.declaration import Command, values
from alignprop_fast.training.options import TrainOptions

if TYPE_CHECKING:
    from alignprop_fast.evaluation.watch import Watched

SAMPLE_PICTURES = 8
MOST_AHEAD = 1000  # prompts that are encoded at the start; of more, the others when they are drawn
_OURS = ("config.yaml", "metrics.jsonl", "samples", "checkpoints", "pytorch_lora_weights.safetensors", "reward.png")


class Session:
    """A run that is set up: everything the user gave is read and checked, the first pictures are drawn.

    Nothing is written before all of that is done. Of several processes (`accelerate launch`) all train, and the main
    one alone prints, writes and draws sample pictures.

    Raises:
        ValueError, OSError: bad input, one line each.
    """

    def __init__(
        self,
        options: TrainOptions,
        console: Console,
        folder: OutputFolder,
        *,
        resume: bool = False,
        resume_from: str | None = None,
    ):
        import torch

        from alignprop_fast.training.launcher import read_launcher
        from alignprop_fast.training.placement import make_deterministic
        from alignprop_fast.training.processes import main_process_first, start_processes
        from alignprop_fast.training.trainer import AlignPropTrainer

        self.console, self._taken, self.folder = console, folder, folder.path.resolve()
        launcher = read_launcher()
        wanted, of_device = launcher.choose_device(options.device)
        if options.deterministic and wanted != "cpu" and torch.cuda.is_available():
            make_deterministic()  # before a device is made the current one, which starts CUDA
        device = pick_device(wanted)
        default = "no" if device == "cpu" else "bf16"
        precision, of_precision = launcher.choose_precision(options.mixed_precision, default)
        for line in filter(None, (of_device, of_precision)):
            console.print(line, soft_wrap=True)
        processes = start_processes(cpu=device == "cpu")
        if processes.num_processes != process_count():  # each would be a run, in one folder
            raise ValueError(
                f"the launcher speaks of {process_count()} processes, and accelerate sees {processes.num_processes}: "
                "use accelerate launch or torchrun"
            )
        self.is_main = processes.is_main_process
        with main_process_first():  # what is wrong for all is said once
            folder.check()
            self._check_folder(resume or resume_from is not None)
            self.rows = load_rows(options.prompts)
            self.prompts = [row.prompt for row in self.rows]
            check_tracker(options.log_with)
            self.options = self._held_to_device(_resolved(options, precision, self.folder), device)
            config = make_config(self.options, device, self._checkpoint(resume, resume_from))
        rewards = open_rewards(self.options, device)
        self.reward, self.watch, self.stopping = rewards.reward, rewards.watch, make_stopping(self.options)
        pipeline = open_model(self.options, device)
        self._check_reward(pipeline.sd_pipeline, device)
        self.records = Records(self.folder, options.reward)
        self.prediction: Prediction | None = None
        self.peak_bytes = 0  # of the training steps, measured
        owners: dict[str, Any] = {"stopping": self.stopping, "rewards": rewards.normalised}
        self.trainer = AlignPropTrainer(
            config,
            rewards.trained,
            self._draw_prompt,
            pipeline,
            self._after_step,
            stateful={name: owner for name, owner in owners.items() if owner is not None},
        )
        check_adapters(pipeline.sd_pipeline)
        tell_sampler(self.trainer.sampler, rewards, self.rows[0])
        watched = [] if self.watch is None else [task.prompt for task in self.watch.tasks]
        self.trainer.sampler.say_what_is_cut([*self.prompts, *watched], options.negative_prompt)
        self.trainer.sampler.encode_ahead(self.prompts[:MOST_AHEAD], options.negative_prompt)
        self._check_budget()
        self.before = self._first_pictures()
        self._watched = self._look() if self.is_main and self.trainer.steps_done == 0 else None
        self.after = self.before

    def run(self) -> None:
        """Train to the end and write the results.

        Raises:
            typer.Exit: a signal (128 and its number, with a checkpoint), or no finite loss in many steps in a row (1).
        """
        trainer, steps = self.trainer, self.options.steps
        with Interrupt(self.console) as interrupt:
            self._begin_folder()
            stopped, number = self._train(interrupt)
            if trainer.steps_done < steps:
                self._save()
                if not stopped:
                    self._leave(number)
            self._finish()

    def _train(self, interrupt: Interrupt) -> tuple[bool, int]:
        """Step until the end, early stopping or a signal; returns whether stopping has come, and the signal or 0."""
        from alignprop_fast.training.processes import largest

        trainer, stopped, number = self.trainer, self._stopped(), 0
        with Display(self.console, trainer.steps_done, self.options.steps) as display:
            try:
                for metrics in () if stopped else trainer.steps():
                    display.update(metrics)
                    stopped = self._stopped()
                    self.peak_bytes = max(self.peak_bytes, metrics.peak_bytes)
                    # All or none: one that left alone would be waited for.
                    number = largest(interrupt.number)
                    if number or stopped:
                        break
            except ValueError as error:
                if trainer.metrics is None or trainer.metrics.status != "not_finite":
                    raise
                fail(str(error))
                raise typer.Exit(FAILED) from error
        return stopped, number

    def draw(self, rows: Sequence[PromptRow], first_seed: int | None = None) -> Pictures:
        """Pictures of the rows' prompts under the present adapters, their rewards; picture i has seed first_seed + i.

        With `ema_decay` the adapters are the averaged ones, here and where something is watched. Draws from generators
        of its own: training's random numbers are not touched.
        """
        import torch

        from alignprop_fast.training.metrics import reward_parts

        first = self.options.seed if first_seed is None else first_seed
        seeds, size = range(first, first + len(rows)), self.options.batch_size
        images: list[Image.Image] = []
        rewards: list[float] = []
        parts: dict[str, list[float]] = {}
        for start in range(0, len(rows), size):
            batch = [row.prompt for row in rows[start : start + size]]
            metadata = [dict(row.metadata) for row in rows[start : start + size]]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + size]]
            with torch.no_grad(), self.trainer.averaged_weights():
                images_BCHW = self.trainer.sampler(batch, self.options.negative_prompt, generators, grad_steps=())
                scores_B, info = self.reward(images_BCHW, batch, metadata)
            images += to_images(images_BCHW)
            rewards += scores_B.tolist()
            for name, mean in reward_parts(info).items():
                parts.setdefault(name, []).extend([mean] * len(batch))
        means = {name: fmean(values) for name, values in parts.items()}
        return Pictures(tuple(images), tuple(row.prompt for row in rows), tuple(seeds), tuple(rewards), means)

    def _first_pictures(self) -> Pictures:
        if not self.is_main:
            return Pictures((), (), ())
        return self.draw(_spread(self.rows)) if self.trainer.steps_done == 0 else self.records.first_pictures()

    def _draw_again(self) -> Pictures:
        """The sample pictures under the present adapters: prompts and seeds are those of step 0."""
        rows = _spread(self.rows)
        if tuple(row.prompt for row in rows) != self.before.prompts:  # the file has changed since the run began
            known = {row.prompt: row for row in self.rows}
            rows = [known.get(prompt, PromptRow(prompt)) for prompt in self.before.prompts]
        return self.draw(rows, self.before.seeds[0])

    def _check_folder(self, resume: bool) -> None:
        used = [name for name in _OURS if (self.folder / name).exists()]
        if used and not resume:
            raise ValueError(
                f"{self.folder} holds an earlier run ({used[0]}): {go_on_by(self.folder)}, "
                "or choose another --output-dir"
            )

    def _checkpoint(self, resume: bool, resume_from: str | None) -> str:
        """What the trainer is to resume from; a run that was killed before its first checkpoint begins anew."""
        from alignprop_fast.training.checkpoint import checkpoints

        if resume_from is not None:
            return resume_from
        return str(self.folder) if resume and checkpoints(self.folder / "checkpoints") else ""

    def _held_to_device(self, options: TrainOptions, device: str) -> TrainOptions:
        """With no larger a budget than the device has; says so where that is less than was asked for."""
        budget = parse_budget(options.memory_budget)
        if not isinstance(budget, int):
            return options
        _, budget_bytes, note = budget_here(budget, device)
        if note:
            self.console.print(note, soft_wrap=True)
        return replace(options, memory_budget=str(budget_bytes)) if note else options

    def _check_budget(self) -> None:
        """Have a plan made now: a budget that no plan can keep is to be refused before anything is written."""
        sampler, options = self.trainer.sampler, self.options
        with self.trainer.autocast():  # as the training steps will
            budget_bytes = sampler.settled_budget(options.batch_size, options.negative_prompt)
            if budget_bytes is None:
                return
            table = sampler.solver(options.batch_size, options.negative_prompt).table
        steps = options.num_inference_steps
        self.prediction = predict(table, steps, options.truncation, options.batch_size, budget_bytes)

    def _check_reward(self, pipe: Any, device: str) -> None:
        """Score a grey batch: a reward without gradient is to be refused before anything is written.

        To be called before the trainer seeds or restores random numbers, of which a reward may draw some.
        """
        import torch

        from alignprop_fast.models.pipeline_adapter import picture_size

        count = self.options.batch_size
        height, width = picture_size(pipe, self.options.height, self.options.width)
        images_BCHW = torch.full((count, 3, height, width), 0.5, device=device, requires_grad=True)
        first = self.rows[0]
        self.reward(images_BCHW, [first.prompt] * count, [dict(first.metadata) for _ in range(count)])

    def _draw_prompt(self) -> tuple[str, dict[str, Any]]:
        row = random.choice(self.rows)
        return row.prompt, dict(row.metadata)

    def _begin_folder(self) -> None:
        if not self.is_main:
            return
        step = self.trainer.steps_done
        self._taken.begin()
        # First, since a used folder without it could neither be resumed nor begun anew, should the process die here.
        _write_text(self.folder / "config.yaml", yaml.safe_dump(values(self.options, Command.TRAIN), sort_keys=False))
        _write_text(self.folder / "versions.json", json.dumps(self._versions(), indent=1) + "\n")
        if self.prediction is not None:
            title = f"{Path(self.options.model).name}, batch {self.options.batch_size}, reward {self.options.reward}"
            plot_plan(self.folder / "plan.png", self.prediction.table, self.prediction.worst, title)
        self.records.begin(step)
        if step == 0:
            self.records.add_samples(0, self.before, self._watched, self.trainer.accelerator)

    def _versions(self) -> dict[str, str]:
        import torch

        from alignprop_fast.training.state import versions

        device = self.trainer.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {**versions(), "device": name}

    def _after_step(self, pairs: dict[str, Any], step: int, tracker: Any) -> None:
        """The trainer's hook: called before the step's checkpoint, so that a resumed run finds every line before it."""
        metrics = self.trainer.metrics
        assert metrics is not None
        if not self.is_main:
            return
        self.records.add_step(metrics)
        if metrics.step % self.options.sample_every == 0 or metrics.step == self.options.steps:
            self.after = self._draw_again()
            self.records.add_samples(metrics.step, self.after, self._look(), self.trainer.accelerator)

    def _look(self) -> Watched | None:
        """What is watched, under the present adapters."""
        if self.watch is None:
            return None
        step = self.trainer.steps_done
        with self.trainer.averaged_weights():
            watched = self.watch.look(self.trainer.sampler)
            # The look at the end of a run must not count: a run that is resumed to more steps would have one more.
            if self.stopping is not None and step % self.options.sample_every == 0:
                self.stopping.update(step, watched.reward, self.trainer.trainable_layers)
        return watched

    def _stopped(self) -> bool:
        """Whether early stopping has stopped the run; the main process decides, and all must ask."""
        from alignprop_fast.training.processes import any_process

        return any_process(self.is_main and self.stopping is not None and self.stopping.stop)

    def _save(self) -> None:
        if self.trainer.steps_done % self.options.save_every or self.trainer.steps_done == 0:
            self.trainer.save_checkpoint()

    def _leave(self, number: int) -> None:
        done = self.trainer.steps_done
        self.console.print(f"stopped after step {done}; to {go_on_by(self.folder)}", soft_wrap=True)
        raise typer.Exit(BY_SIGNAL + number)

    def _finish(self) -> None:
        steps = self._keep_best()
        if self.is_main:
            self._write_results(steps)
        self.trainer.accelerator.end_training()

    def _write_results(self, steps: int) -> None:
        pipe = self.trainer.sd_pipeline.sd_pipeline
        write_adapters(pipe, self.folder, self.options, self.prompts, steps)
        # What early stopping has kept is the average already.
        averaged = self.options.ema_decay > 0 and self.stopping is None
        if averaged:
            with self.trainer.averaged_weights():
                write_adapters(pipe, self.folder / AVERAGED, self.options, self.prompts, steps)
        self.records.plot()
        if self.after is self.before or steps < self.trainer.steps_done:  # resumed at the end, or gone back
            self.after = self._draw_again()
        title = f"Before (above) and after (below) {steps} steps on {self.options.reward}"
        save_before_after(self.folder / "before_after.png", self.before, self.after, title)
        write_card(self.folder, self.options, self.prompts, steps, self.before, self.after, averaged)

    def _keep_best(self) -> int:
        """Go back to the adapters that early stopping kept, if it is on; returns the steps that the adapters had."""
        done, stopping = self.trainer.steps_done, self.stopping
        if stopping is None:
            return done
        stopping.restore(self.trainer.trainable_layers)
        self.trainer.update.restart_average()  # what was kept is the average, which pictures are still to be drawn with
        why = "stopped" if stopping.stop else "done"
        self.console.print(f"{why} after step {done}: the adapters of step {stopping.kept_step} are kept")
        return stopping.kept_step


def _resolved(options: TrainOptions, precision: str, folder: Path) -> TrainOptions:
    return replace(
        resolved(options, precision),
        output_dir=str(folder),
        model=existing_as_absolute(options.model, names=("demo",)),
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


def _spread(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """At most SAMPLE_PICTURES rows, evenly over the list; a short list is gone through again."""
    if len(rows) < SAMPLE_PICTURES:
        return [rows[i % len(rows)] for i in range(SAMPLE_PICTURES)]
    return [rows[i * len(rows) // SAMPLE_PICTURES] for i in range(SAMPLE_PICTURES)]


def _write_text(path: Path, text: str) -> None:
    write_whole(path, text.encode())
