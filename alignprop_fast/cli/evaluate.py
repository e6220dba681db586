"""The command `evaluate`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.options import command_line
from alignprop_fast.cli.pipeline import START_ANEW, PictureProgress, open_pipeline, open_reward, open_sampler
from alignprop_fast.cli.screen import make_console
from alignprop_fast.cli.support import pick_device, quiet_libraries, run_errors, setup_errors
from alignprop_fast.prompts.rows import spread
from alignprop_fast.training.declaration import Command, Panel, like, option, values
from alignprop_fast.training.options import PictureOptions, WatchOptions

if TYPE_CHECKING:
    from alignprop_fast.evaluation.evaluate import Evaluation, Summary, Task, Variant
    from alignprop_fast.generate.sampler import DifferentiableSampler

GRID_ROWS = 12
_TRAINING, _HELDOUT = "prompts", "heldout"


@dataclass
class EvaluateOptions(PictureOptions):
    """Options of `evaluate`."""

    lora: tuple[str, ...] = option(
        (),
        "Adapters to compare with the base model: an output folder of train, or a LoRA file (.safetensors). May be "
        "given several times.",
        Panel.MODEL,
        commands=Command.EVALUATE,
        shown="none, only the base model",
    )
    scale: tuple[float, ...] = option(
        (),
        "Strength of the adapters: 0 is the base model, 1 the trained one. May be given several times.",
        Panel.MODEL,
        commands=Command.EVALUATE,
        shown="1",
    )
    heldout_prompts: str | None = option(
        None,
        "Prompts that were not trained on, reported separately from --prompts: a file or a set.",
        Panel.PROMPTS,
        commands=Command.EVALUATE,
        shown="none",
    )
    diversity_model: str | None = like(
        WatchOptions,
        "diversity_model",
        help="CLIP model (folder or Hub id) that measures diversity; needs two or more images per prompt.",
        panel=Panel.REWARD,
    )


@command_line(Command.EVALUATE, EvaluateOptions(output_dir="alignprop-evaluation"))
def evaluate(ctx: typer.Context, options: EvaluateOptions) -> None:
    """Measure rewards of the base model and of adapters, on the same prompts and seeds.

    Writes evaluation.csv (one line per picture and part of the reward), summary.csv, grid.png (a row per prompt, a
    column per adapter and scale), settings.json and, with several scales, reward_by_scale.png to --output-dir.

    "gained" is the share of pictures with a higher reward than the base model's picture of the same seed. Diversity is
    the mean over prompts of the mean cosine distance, 1 - cos, between CLIP embeddings of a prompt's pictures.

    **Examples**

    - `alignprop-fast evaluate --lora run --reward clip,colorfulness --heldout-prompts demo-heldout --output-dir out`
    - `alignprop-fast evaluate --lora a --lora b --scale 0.5 --scale 1 --images-per-prompt 4 --output-dir scales`
    """
    console, folder = make_console(), ctx.with_resource(OutputFolder(options.output_dir))
    with setup_errors():
        quiet_libraries(console)
        folder.check_new()
        _check(options)
        run = _open_run(options)
        # The first batch is drawn before anything is printed or written, to meet all errors by then.
        batches = run.batches(options.batch_size, options.negative_prompt)
        first = next(batches)
    pictures, times = len(run.tasks), len(run.variants)
    console.print(f"{pictures} pictures of {options.model} under {options.reward}, drawn {times} times", soft_wrap=True)
    folder.begin()
    with run_errors(folder.path, START_ANEW):
        with PictureProgress(console, pictures * times) as progress:
            for count in chain([first], batches):
                progress.advance(count)
        summaries = run.evaluation.summaries()
        _write(folder.path, run, summaries, f"{Path(options.model).name} under {options.reward}")
        _write_settings(folder.path, options)
    _print(console, summaries)
    if run.evaluation.embed is None:
        console.print("no diversity: it needs --images-per-prompt 2 or more")
    path = folder.path
    console.print(f"pictures: {path / 'grid.png'}\nnumbers:  {path / 'summary.csv'}", soft_wrap=True)


class _Run:
    """Draws and scores every task under every variant, and keeps the pictures for the grids."""

    def __init__(
        self,
        sampler: DifferentiableSampler,
        evaluation: Evaluation,
        variants: Mapping[Variant, Mapping[str, float]],
        tasks: Sequence[Task],
    ):
        self.sampler, self.evaluation, self.variants, self.tasks = sampler, evaluation, variants, tasks
        self.shown: dict[tuple[Variant, Task], tuple[Any, float]] = {}  # picture and reward
        sets = dict.fromkeys(task.prompt_set for task in tasks)
        self.rows = {s: spread([t for t in tasks if t.prompt_set == s and t.number == 0], GRID_ROWS) for s in sets}

    def batches(self, batch_size: int, negative_prompt: str | None) -> Iterator[int]:
        """Yields the number of finished pictures after each batch."""
        from alignprop_fast.evaluation.evaluate import draw
        from alignprop_fast.models.lora.mix import set_lora_weights
        from alignprop_fast.report.pictures import to_images

        prompts, seeds = [task.prompt for task in self.tasks], [task.seed for task in self.tasks]
        wanted = {task for rows in self.rows.values() for task in rows}
        for variant, weights in self.variants.items():
            set_lora_weights(self.sampler.model.pipe, weights)
            done = 0
            for images_BCHW in draw(self.sampler, prompts, seeds, batch_size, negative_prompt):
                batch = self.tasks[done : done + len(images_BCHW)]
                done += len(batch)
                rewards = self.evaluation.add(variant, batch, images_BCHW)
                for i, task in enumerate(batch):
                    if task in wanted:
                        self.shown[variant, task] = (to_images(images_BCHW[i : i + 1])[0], rewards[i])
                yield len(batch)


def _open_run(options: EvaluateOptions) -> _Run:
    """The evaluation: the model with all adapters, the scorers, the variants and the tasks."""
    from alignprop_fast.evaluation.evaluate import Evaluation, tasks_of
    from alignprop_fast.models.lora.mix import load_loras
    from alignprop_fast.prompts.rows import load_rows
    from alignprop_fast.rewards.diversity import ImageEmbedder
    from alignprop_fast.rewards.weights import RewardLoading

    heldout = {_HELDOUT: options.heldout_prompts} if options.heldout_prompts else {}
    tasks = [
        task
        for name, prompts in ({_TRAINING: options.prompts} | heldout).items()
        for task in tasks_of(name, load_rows(prompts), options.images_per_prompt, options.seed)
    ]
    device = pick_device(options.device)
    pipe = open_pipeline(options, device)
    variants = _variants(_labels(options.lora), load_loras(pipe, options.lora), options.scale or [1.0])
    scored = open_reward(options.reward, pipe, options.reward_model, options.allow_pickle)
    parts = [part.name for part in scored.parts] if len(scored.parts) > 1 else []
    embed = None
    if options.images_per_prompt > 1:
        embed = ImageEmbedder(options.diversity_model, RewardLoading(options.allow_pickle)).to(device)
    elif options.diversity_model is not None:
        raise ValueError("--diversity-model needs several pictures per prompt: add --images-per-prompt 4")
    sampler = open_sampler(options, pipe)
    sampler.say_what_is_cut([task.prompt for task in tasks], options.negative_prompt)
    return _Run(sampler, Evaluation(scored, parts, embed), variants, tasks)


def _variants(labels: Sequence[str], names: Sequence[str], scales: Sequence[float]) -> dict[Variant, dict[str, float]]:
    """The variants to compare, each with its weights of the loaded adapters. Scale 0 is the base model, drawn once."""
    from alignprop_fast.evaluation.evaluate import BASE, Variant

    pairs = [(label, name, scale) for label, name in zip(labels, names, strict=True) for scale in scales if scale != 0]
    return {BASE: {}, **{Variant(label, scale): {name: scale} for label, name, scale in pairs}}


def _check(options: EvaluateOptions) -> None:
    lora, scale = options.lora, options.scale
    if scale and not lora:
        raise ValueError("--scale is the strength of adapters: give some with --lora")
    if not all(map(math.isfinite, scale)):
        raise ValueError("--scale must be a number such as 0.5")
    if len({Path(path).expanduser().resolve() for path in lora}) < len(lora):
        raise ValueError("--lora names the same adapters twice: give them once, and --scale several times")


def _labels(lora: Sequence[str]) -> list[str]:
    """Names of the adapters: the path's last part, or the full path if two (or one and the base model) coincide."""
    paths = [Path(path).expanduser() for path in lora]
    short = [path.stem if path.is_file() else path.resolve().name for path in paths]
    unclear = {name for name in short if short.count(name) > 1} | {"base"}
    return [str(path.resolve()) if name in unclear else name for name, path in zip(short, paths, strict=True)]


def _write(folder: Path, run: _Run, summaries: Sequence[Summary], title: str) -> None:
    from alignprop_fast.report.evaluation import plot_by_scale, save_comparison, save_table

    save_table(folder / "evaluation.csv", run.evaluation.scores)
    save_table(folder / "summary.csv", summaries)
    for prompt_set, tasks in run.rows.items():
        name = "grid.png" if prompt_set == _TRAINING else f"grid_{prompt_set}.png"
        rows = []
        for task in tasks:
            cells = [run.shown[variant, task] for variant in run.variants]
            notes = [f"{reward:.3f}  seed {task.seed}" for _, reward in cells]
            rows.append((task.prompt, [image for image, _ in cells], notes))
        heading = title if prompt_set == _TRAINING else f"{title}, held-out prompts"
        save_comparison(folder / name, heading, [str(variant) for variant in run.variants], rows)
    if len({variant.scale for variant in run.variants}) > 2:
        plot_by_scale(folder / "reward_by_scale.png", summaries)


def _write_settings(folder: Path, options: EvaluateOptions) -> None:
    from alignprop_fast.files import write_whole
    from alignprop_fast.training.state import package_versions

    record = {**values(options, Command.EVALUATE), "versions": package_versions()}
    write_whole(folder / "settings.json", (json.dumps(record, indent=1) + "\n").encode())


def _print(console: Console, summaries: Sequence[Summary]) -> None:
    from alignprop_fast.evaluation.evaluate import BASE, Variant

    table = Table("", "mean", "change", "gained", box=SIMPLE_HEAD)
    heading = None
    for s in summaries:
        if heading != (heading := f"{s.part}, {s.prompt_set} ({s.count})"):
            table.add_section()
            table.add_row(Text(heading, style="bold"))
        variant = Variant(s.adapter, s.scale)
        row = [f"  {variant}", _with_error(s.mean, s.standard_error)]
        if variant != BASE:
            row += [_with_error(s.change, s.change_standard_error, "+"), f"{s.gained_share:.0%}"]
        table.add_row(*row)
    console.print(table)
    console.print("\u00b1: standard error; change, gained: against the base model with the same seeds")


def _with_error(mean: float, error: float, sign: str = "") -> str:
    return f"{mean:{sign}.3f}" + ("" if math.isnan(error) else f" \u00b1 {error:.3f}")
