"""Two ways to train the bundled 4-step twin on the same prompts, and what each leaves of its drawing in 4 steps.

    python -m benchmarks.learning.few_step --output-dir few_step

reward: the gradient of the demo's reward through all 4 steps, with the settings of `alignprop-fast demo`.
ordinary: the denoising loss of usual LoRA trainers, on pictures that the guided teacher draws of the same prompts.

Both start at the same adapters and have the same batch size and CPU seconds. Marks are of pictures in 4 steps without
guidance, with prompts that neither way trains on (`alignprop_fast/making/marks.py` explains them). The CSV has a row
for each way, learning rate and seed. Two sheets show the first seed: what each way leaves, and 24 held-out prompts as
the teacher, the twin and the twin after reward training draw them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from alignprop_fast.cli.demo import SETTINGS
from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.parts import sampling_of
from alignprop_fast.cli.set_up import set_up
from alignprop_fast.cli.support import quiet_libraries
from alignprop_fast.demo import clip_path, counter_path
from alignprop_fast.demo.counter_network import Counter
from alignprop_fast.demo.grid import draw_grid
from alignprop_fast.making.marks import Painter, clip_finds, held_out_scenes, judge_scenes, parse, sharpness
from alignprop_fast.making.scenes import combination
from alignprop_fast.models.load.pipeline import load_pipeline
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.prompts.rows import load_prompts
from alignprop_fast.report.pictures import to_images
from alignprop_fast.rewards import get_reward
from benchmarks import RESULTS, ROOT
from benchmarks.rows import write_rows

LEARNING_RATES = (1e-4, 5e-4, 2e-3)  # of the ordinary way: diffusers' example script has the first, the demo the last
TEACHER_STEPS, TEACHER_GUIDANCE = 12, 2.0
PICTURES = 4  # of the teacher for each training prompt
REPEATS = 2  # judged pictures of each prompt
SHOWN = 6  # held-out prompts in the first sheet
COMPARED = 24  # held-out scenes in the second one


class Judge:
    """Marks of a pipeline that draws in 4 steps, from pictures of prompts outside the training set."""

    def __init__(self) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        trained = {combination(parse(prompt)) for prompt in load_prompts(SETTINGS.prompts)}
        self.scenes = [scene for scene in held_out_scenes() if combination(scene) not in trained] * REPEATS
        self.told = load_prompts("demo-heldout")
        self.counter = Counter.load(counter_path()).eval()
        self.clip = CLIPModel.from_pretrained(clip_path(), local_files_only=True).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(clip_path(), local_files_only=True)
        self.score = get_reward("clip")

    @torch.no_grad()
    def marks(self, paint: Painter) -> tuple[dict[str, float], Tensor]:
        """Marks by name, and the pictures [SHOWN, 3, 64, 64] of the first held-out prompts."""
        pictures, prompts = paint([scene.caption for scene in self.scenes]), self.told * REPEATS
        told = paint(prompts)
        verdicts = judge_scenes(pictures, self.scenes, self.counter)
        every = [*self.told, *load_prompts("demo")]
        wanted = list(range(len(self.told))) * REPEATS
        verdicts["clip of 64"] = clip_finds(told, wanted, every, self.clip, self.tokenizer)
        shares = {name: mean(values) for name, values in verdicts.items()}
        scores = self.score(told, prompts, [{}] * len(prompts))[0]
        return {**shares, "clip": scores.mean().item(), "sharpness": sharpness(pictures)}, told[:SHOWN]


@dataclass(frozen=True)
class Trained:
    """A trained pipeline. cpu_seconds: of the training, sample pictures and all."""

    pipe: Any
    steps: int
    cpu_seconds: float


def by_reward(seed: int, folder: Path, console: Console) -> Trained:
    """The steps of `alignprop-fast demo`."""
    options = replace(SETTINGS, seed=seed, output_dir=str(folder), sample_every=SETTINGS.steps + 1)
    with OutputFolder(options.output_dir) as taken:
        session, start = set_up(options, console, taken), time.process_time()
        session.run()
        return Trained(session.trainer.sd_pipeline.sd_pipeline, options.steps, time.process_time() - start)


def teacher_latents(teacher: Any, prompts: Sequence[str]) -> Tensor:
    """Latents [len(prompts), C, h, w] as the teacher draws them."""
    return teacher(
        list(prompts),
        num_inference_steps=TEACHER_STEPS,
        guidance_scale=TEACHER_GUIDANCE,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


def ordinarily(latents: Tensor, prompts: Sequence[str], learning_rate: float, seed: int, cpu_seconds: float) -> Trained:
    """Denoising steps on (latents, prompts) until the CPU seconds are spent."""
    pipe = load_pipeline(SETTINGS.model)
    torch.manual_seed(seed)
    parameters = add_lora(pipe, SETTINGS.lora_rank, SETTINGS.lora_rank, SETTINGS.lora_targets)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    with torch.no_grad():
        text = pipe.encode_prompt(list(prompts), "cpu", 1, do_classifier_free_guidance=False)[0]
    generator, start = torch.Generator().manual_seed(seed), time.process_time()
    for step in count():
        if time.process_time() - start >= cpu_seconds:
            return Trained(pipe, step, time.process_time() - start)
        index = torch.randint(len(latents), (SETTINGS.batch_size,), generator=generator)
        times = torch.randint(pipe.scheduler.config.num_train_timesteps, index.shape, generator=generator)
        noise = torch.randn(latents[index].shape, generator=generator)
        noisy, velocity = (
            make(latents[index], noise, times) for make in (pipe.scheduler.add_noise, pipe.scheduler.get_velocity)
        )
        loss = (pipe.unet(noisy, times, text[index]).sample - velocity).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError("count() has no end")


def summary(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """A line for each way: the mean of every mark over the seeds, with its standard error."""
    lines = []
    for way in dict.fromkeys((row["way"], row["learning_rate"]) for row in rows):
        mine = [row for row in rows if (row["way"], row["learning_rate"]) == way]
        values = {name: [float(row[name]) for row in mine] for name in names}
        error = {name: stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0 for name, v in values.items()}
        marks = ", ".join(f"{name} {mean(values[name]):.3f} ({error[name]:.3f})" for name in names)
        lines.append(f"{' '.join(map(str, way)).strip()}: {marks}")
    return lines


@dataclass
class Comparison:
    """The rows of the table and the sheets, filled way by way."""

    judge: Judge
    seeds: Sequence[int]
    console: Console
    rows: list[dict[str, Any]] = field(default_factory=list)
    shown: list[Image.Image] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    compared: list[Image.Image] = field(default_factory=list)

    def add(self, way: str, learning_rate: float | str, seed: int | str, trained: Trained) -> None:
        """Judge one pipeline; before any training, learning rate and seed are ""."""
        paint = four_steps(trained.pipe)
        marks, pictures = self.judge.marks(paint)
        known = {"way": way, "learning_rate": learning_rate, "seed": seed, "optimizer_steps": trained.steps}
        known |= {"cpu_seconds": round(trained.cpu_seconds, 1)}
        self.rows.append(known | {name: round(value, 4) for name, value in marks.items()})
        self.console.print(self.rows[-1])
        if seed in ("", self.seeds[0]):
            self.shown.extend(to_images(pictures))
            self.captions.extend(f"{way} {learning_rate}".strip() for _ in pictures)
            if way != "ordinary":
                self.compare(paint)

    def compare(self, paint: Painter) -> None:
        """Draw the prompts of the second sheet."""
        self.compared.extend(to_images(paint(compared_prompts())))


def four_steps(pipe: Any) -> Painter:
    pipe.set_progress_bar_config(disable=True)
    own = sampling_of(SETTINGS)
    return Painter(pipe, own.num_inference_steps, own.guidance_scale)


def compared_prompts() -> list[str]:
    """COMPARED held-out captions, spread over all."""
    captions = [scene.caption for scene in held_out_scenes()]
    return [captions[index * len(captions) // COMPARED] for index in range(COMPARED)]


def compared_sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """A row of four prompts, each drawn by the teacher, the twin, and the twin after reward training."""
    columns, order, captions = 12, [], []
    for index, prompt in enumerate(compared_prompts()):
        order += [pictures[model * COMPARED + index] for model in range(3)]
        captions += ["", prompt, ""]
    return draw_grid(order, captions, columns, tile_pixels=96)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the runs; must be new")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=LEARNING_RATES, help="of the ordinary way")
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu" / "few_step.csv")
    parser.add_argument("--png", type=Path, default=ROOT / "docs" / "pictures" / "few_step.png")
    parser.add_argument("--compared", type=Path, default=ROOT / "docs" / "pictures" / "teacher_twin_trained.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(highlight=False)
    quiet_libraries(console)
    args.output_dir.mkdir(parents=True)
    comparison = Comparison(Judge(), args.seeds, console)
    teacher = load_pipeline("demo")
    teacher.set_progress_bar_config(disable=True)
    prompts = [prompt for prompt in load_prompts(SETTINGS.prompts) for _ in range(PICTURES)]
    latents = teacher_latents(teacher, prompts)
    comparison.compare(Painter(teacher, TEACHER_STEPS, TEACHER_GUIDANCE))
    comparison.add("before", "", "", Trained(load_pipeline(SETTINGS.model), 0, 0.0))
    for seed in args.seeds:
        trained = by_reward(seed, args.output_dir / f"reward_{seed}", console)
        comparison.add("reward", SETTINGS.learning_rate, seed, trained)
        for learning_rate in args.learning_rates:
            other = ordinarily(latents, prompts, learning_rate, seed, trained.cpu_seconds)
            comparison.add("ordinary", learning_rate, seed, other)
    rows = comparison.rows
    write_rows(args.csv, [row | {"versions": f"torch={version('torch')}"} for row in rows])
    draw_grid(comparison.shown, comparison.captions, columns=SHOWN).save(args.png, optimize=True)
    compared_sheet(comparison.compared).save(args.compared, optimize=True)
    console.print(*summary(rows, list(rows[0])[5:]), sep="\n")


if __name__ == "__main__":
    main()
