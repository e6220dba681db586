"""The command `sample`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import typer

from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.options import command_line
from alignprop_fast.cli.pipeline import START_ANEW, PictureProgress, open_pipeline, open_sampler
from alignprop_fast.cli.screen import make_console
from alignprop_fast.cli.support import pick_device, quiet_libraries, run_errors, setup_errors
from alignprop_fast.training.declaration import Command, Panel, option
from alignprop_fast.training.options import PictureOptions


@dataclass
class SampleOptions(PictureOptions):
    """Options of `sample`."""

    lora: str | None = option(
        None, "Output folder of train whose adapters to draw with.", Panel.MODEL, commands=Command.SAMPLE, shown="none"
    )
    prompt: tuple[str, ...] = option(
        (), "A prompt, instead of --prompts; may be given several times.", Panel.PROMPTS, commands=Command.SAMPLE
    )


@command_line(Command.SAMPLE, SampleOptions(output_dir="alignprop-samples"))
def sample(ctx: typer.Context, options: SampleOptions) -> None:
    """Draw pictures, with or without trained adapters.

    Writes one PNG per picture, named by number, prompt and seed, and grid.png with all pictures, to --output-dir.

    **Examples**

    - `alignprop-fast sample --prompt "a red apple" --images-per-prompt 4 --output-dir apples`
    - `alignprop-fast sample --model path/to/sd15 --lora run --prompts animals --output-dir after`
    """
    console, taken = make_console(), ctx.with_resource(OutputFolder(options.output_dir))
    folder = taken.path
    with setup_errors():
        quiet_libraries(console)
        from alignprop_fast.evaluation.evaluate import draw
        from alignprop_fast.models.lora.load_save import load_lora
        from alignprop_fast.prompts.rows import load_prompts
        from alignprop_fast.report.pictures import Pictures, save_grid, save_image, to_images

        taken.check_new()
        wanted = options.prompt or load_prompts(options.prompts)
        texts = [text for text in wanted for _ in range(options.images_per_prompt)]
        pipe = open_pipeline(options, pick_device(options.device))
        if options.lora is not None:
            load_lora(pipe, Path(options.lora).expanduser())
        sampler = open_sampler(options, pipe)
        sampler.say_what_is_cut(texts, options.negative_prompt)
        # The first batch is drawn before the folder is made, to meet all errors by then.
        seeds = range(options.seed, options.seed + len(texts))
        batches = draw(sampler, texts, seeds, options.batch_size, options.negative_prompt)
        first = next(batches)
    taken.begin()
    with run_errors(folder, START_ANEW):
        images: list[Any] = []
        with PictureProgress(console, len(texts)) as progress:
            for images_BCHW in chain([first], batches):
                for image in to_images(images_BCHW):
                    i = len(images)
                    save_image(image, folder / f"{i:03d}_{_slug(texts[i])}_seed{seeds[i]}.png")
                    images.append(image)
                progress.advance(len(images_BCHW))
        pictures = Pictures(tuple(images), tuple(texts), tuple(seeds))
        save_grid(folder / "grid.png", pictures, _title(options))
    console.print(f"{len(images)} pictures in {folder}, all of them in {folder / 'grid.png'}", soft_wrap=True)


def _title(options: SampleOptions) -> str:
    adapters = f" with {Path(options.lora).name}" if options.lora else ""
    return f"{Path(options.model).name}{adapters}"


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "picture"
