"""A training run after its set-up, for `train` and `demo`: the loop, and the files in its folder.

config.yaml, versions.json      all options as resolved; versions of the libraries
metrics.jsonl                   one line per optimizer step
samples/step_<n>.png, step_<n>/ the same prompts and seeds before, during and after; samples.jsonl: their rewards,
                                and the watched scores
checkpoints/                    to resume from
reward.png, before_after.png, README.md (a model card)
plan.png                        memory over a training step, if there is a memory budget
pytorch_lora_weights.safetensors, kohya_lora_weights.safetensors
ema/                            the same for their moving average, with --ema-decay; early stopping keeps it as the
result
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import typer
import yaml
from PIL import Image
from rich.console import Console

from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.parts import Rewards
from alignprop_fast.cli.plan_summary import Prediction
from alignprop_fast.cli.records import Records
from alignprop_fast.cli.results import AVERAGED, remove_adapters, write_adapters, write_card
from alignprop_fast.cli.screen import Display
from alignprop_fast.cli.signals import Interrupt
from alignprop_fast.cli.support import BY_SIGNAL, FAILED, fail, go_on_by
from alignprop_fast.files import write_whole
from alignprop_fast.prompts.rows import PromptRow, spread
from alignprop_fast.report.pictures import Pictures, save_before_after, to_images
from alignprop_fast.report.plan import plot_plan
from alignprop_fast.training.declaration import Command, values
from alignprop_fast.training.options import TrainOptions

if TYPE_CHECKING:
    from alignprop_fast.evaluation.early_stopping import EarlyStopping
    from alignprop_fast.evaluation.watch import Watched
    from alignprop_fast.training.trainer import AlignPropTrainer

SAMPLE_PICTURES = 8


class Session:
    """A run made by `set_up`. Nothing is written before `run`.

    Of several processes (`accelerate launch`) all train, and only the main one prints, writes and draws sample
    pictures.

    Attributes:
        prediction: the plan of a training step; None without a memory budget.
        peak_bytes: measured over the training steps.
        before, after: the sample pictures of step 0 and the newest ones.
        averaged: the folder of the averaged adapters, once they are written; None without them.
    """

    def __init__(
        self,
        console: Console,
        taken: OutputFolder,
        options: TrainOptions,
        rows: Sequence[PromptRow],
        rewards: Rewards,
        stopping: EarlyStopping | None,
        trainer: AlignPropTrainer,
        prediction: Prediction | None,
    ):
        self.console, self._taken, self.folder = console, taken, taken.path.resolve()
        self.options, self.rows, self.prompts = options, rows, [row.prompt for row in rows]
        self.reward, self.watch, self.stopping = rewards.reward, rewards.watch, stopping
        self.trainer, self.prediction, self.peak_bytes = trainer, prediction, 0
        self.is_main = trainer.accelerator.is_main_process
        self.records = Records(self.folder, options.reward)
        self.before = self.after = Pictures((), (), ())
        self._watched: Watched | None = None
        self.averaged: Path | None = None
        trainer.image_samples_callback = self._after_step

    def draw_first(self) -> None:
        """Draw the sample pictures of step 0, or read them if the run is resumed, and score the watched pictures."""
        if not self.is_main:
            return
        is_new = self.trainer.steps_done == 0
        self.before = self.draw(self._sample_rows()) if is_new else self.records.first_pictures()
        self._watched = self._look() if is_new else None
        self.after = self.before

    def run(self) -> None:
        """Train to the end and write the results.

        Raises:
            typer.Exit: after a signal (128 + its number, with a checkpoint), or after many steps in a row without a
                finite loss (1).
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
        """Step until the end, early stopping or a signal. Returns whether it stopped early, and the signal or 0."""
        from alignprop_fast.training.processes import largest

        trainer, stopped, number = self.trainer, self._stopped(), 0
        with Display(self.console, trainer.steps_done, self.options.steps) as display:
            try:
                for metrics in () if stopped else trainer.steps():
                    display.update(metrics)
                    stopped = self._stopped()
                    self.peak_bytes = max(self.peak_bytes, metrics.peak_bytes)
                    # All processes stop or none, because the others would wait for one that left.
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

        With `ema_decay` the averaged adapters are used, here and for watching. Has its own generators, so training's
        random numbers are not touched.
        """
        from alignprop_fast.evaluation.evaluate import draw, score
        from alignprop_fast.training.metrics import reward_parts

        options, first = self.options, self.options.seed if first_seed is None else first_seed
        prompts, seeds = [row.prompt for row in rows], range(first, first + len(rows))
        images: list[Image.Image] = []
        rewards: list[float] = []
        parts: dict[str, list[float]] = {}
        with self.trainer.averaged_weights():
            for images_BCHW in draw(self.trainer.sampler, prompts, seeds, options.batch_size, options.negative_prompt):
                batch = rows[len(images) : len(images) + len(images_BCHW)]
                scores_B, info = score(self.reward, images_BCHW, batch)
                images += to_images(images_BCHW)
                rewards += scores_B.tolist()
                for name, mean in reward_parts(info).items():
                    parts.setdefault(name, []).extend([mean] * len(batch))
        means = {name: fmean(values) for name, values in parts.items()}
        return Pictures(tuple(images), tuple(prompts), tuple(seeds), tuple(rewards), means)

    def _sample_rows(self) -> list[PromptRow]:
        return spread(self.rows, SAMPLE_PICTURES, repeat=True)

    def _draw_again(self) -> Pictures:
        """The sample pictures under the present adapters, with the prompts and seeds of step 0."""
        rows = self._sample_rows()
        if tuple(row.prompt for row in rows) != self.before.prompts:  # the prompt file has changed since the run began
            known = {row.prompt: row for row in self.rows}
            rows = [known.get(prompt, PromptRow(prompt)) for prompt in self.before.prompts]
        return self.draw(rows, self.before.seeds[0])

    def _begin_folder(self) -> None:
        if not self.is_main:
            return
        step = self.trainer.steps_done
        self._taken.begin()
        # First, because without it a run whose process dies here could neither be resumed nor started again.
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

        from alignprop_fast.training.state import package_versions

        device = self.trainer.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {**package_versions(), "device": name}

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
        """Score the watched pictures under the present adapters."""
        if self.watch is None:
            return None
        step = self.trainer.steps_done
        with self.trainer.averaged_weights():
            watched = self.watch.look(self.trainer.sampler)
            # The last watching of a run must not count, or a run resumed to more steps would have one more.
            if self.stopping is not None and step % self.options.sample_every == 0:
                self.stopping.update(step, watched.reward, self.trainer.trainable_layers)
        return watched

    def _stopped(self) -> bool:
        """Whether early stopping has stopped the run. The main process decides, and every process must call this."""
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
        # Early stopping has already kept the average.
        if self.options.ema_decay > 0 and self.stopping is None:
            self.averaged = self.folder / AVERAGED
            with self.trainer.averaged_weights():
                write_adapters(pipe, self.averaged, self.options, self.prompts, steps)
        else:
            remove_adapters(self.folder / AVERAGED)  # of the same run before it was resumed
        if self.after is self.before:  # resumed at its end, so no step has plotted
            self.records.plot()
        if self.after is self.before or steps < self.trainer.steps_done:  # or the adapters went back
            self.after = self._draw_again()
        title = f"Before (above) and after (below) {steps} steps on {self.options.reward}"
        save_before_after(self.folder / "before_after.png", self.before, self.after, title)
        write_card(self.folder, self.options, self.prompts, steps, self.before, self.after, self.averaged is not None)

    def _keep_best(self) -> int:
        """Go back to the adapters that early stopping kept, if it is on; returns the steps that the adapters had."""
        done, stopping = self.trainer.steps_done, self.stopping
        if stopping is None:
            return done
        stopping.restore(self.trainer.trainable_layers)
        self.trainer.update.restart_average()  # the average is now the kept adapters, for pictures
        why = "stopped" if stopping.stop else "done"
        self.console.print(f"{why} after step {done}: the adapters of step {stopping.kept_step} are kept")
        return stopping.kept_step


def _write_text(path: Path, text: str) -> None:
    write_whole(path, text.encode())
