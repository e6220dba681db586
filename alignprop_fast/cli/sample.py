"""The command `sample`."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from alignprop_fast.cli import options as o
from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.options import DEFAULTS
from alignprop_fast.cli.pipeline import START_ANEW, PictureProgress, open_pipeline
from alignprop_fast.cli.screen import make_console
from alignprop_fast.cli.support import pick_device, quiet_libraries, run_errors, setup_errors

Lora = Annotated[
    str | None,
    typer.Option(help="Output folder of train: draw with its adapters.", rich_help_panel="Model", show_default="none"),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(help="A prompt; may be given several times, in place of --prompts.", rich_help_panel="Prompts"),
]
PromptSet = Annotated[str, typer.Option(help=o.PROMPTS_HELP, rich_help_panel="Prompts")]
PerPrompt = Annotated[int, typer.Option(help="Pictures of each prompt.", rich_help_panel="Prompts", min=1)]
FirstSeed = Annotated[
    int,
    typer.Option(
        help="Picture i has seed + i, whatever the batch size.", rich_help_panel="Sampling", min=0, max=2**32 - 1
    ),
]


def sample(
    ctx: typer.Context,
    model: o.Model = DEFAULTS.model,
    model_config: o.ModelConfig = DEFAULTS.model_config,
    allow_pickle: o.AllowPickle = DEFAULTS.allow_pickle,
    lora: Lora = None,
    prompt: Prompt = None,
    prompts: PromptSet = DEFAULTS.prompts,
    images_per_prompt: PerPrompt = 1,
    negative_prompt: o.NegativePrompt = None,
    num_inference_steps: o.InferenceSteps = DEFAULTS.num_inference_steps,
    guidance_scale: o.GuidanceScale = DEFAULTS.guidance_scale,
    true_cfg_scale: o.TrueCfgScale = DEFAULTS.true_cfg_scale,
    scheduler: o.SchedulerChoice = o.SchedulerName.auto,
    eta: o.Eta = DEFAULTS.eta,
    height: o.Height = None,
    width: o.Width = None,
    seed: FirstSeed = DEFAULTS.seed,
    batch_size: o.BatchSize = DEFAULTS.batch_size,
    mixed_precision: o.MixedPrecision = o.Precision.auto,
    device: o.Device = DEFAULTS.device,
    output_dir: o.OutputDir = "alignprop-samples",
) -> None:
    """Draw pictures, with or without trained adapters.

    Writes one PNG per picture, named by number, prompt and seed, and grid.png with all of them, to --output-dir.

    **Examples**

    - `alignprop-fast sample --prompt "a red apple" --images-per-prompt 4 --output-dir apples`
    - `alignprop-fast sample --model path/to/sd15 --lora run --prompts animals --output-dir after`
    """
    console, taken = make_console(), ctx.with_resource(OutputFolder(output_dir))
    folder = taken.path
    with setup_errors():
        quiet_libraries(console)
        from alignprop_fast.evaluation.evaluate import draw
        from alignprop_fast.generate.sampler import DifferentiableSampler
        from alignprop_fast.models.lora.load_save import load_lora
        from alignprop_fast.prompts.rows import load_prompts
        from alignprop_fast.report.pictures import Pictures, save_grid, save_image, to_images

        taken.check_new()
        texts = [text for text in (prompt or load_prompts(prompts)) for _ in range(images_per_prompt)]
        pipe = open_pipeline(model, pick_device(device), mixed_precision, scheduler, model_config, allow_pickle)
        if lora is not None:
            load_lora(pipe, Path(lora).expanduser())
        sampler = DifferentiableSampler(
            pipe,
            num_inference_steps,
            guidance_scale,
            eta,
            true_cfg_scale=true_cfg_scale,
            height=height,
            width=width,
        )
        sampler.say_what_is_cut(texts, negative_prompt)
        # The first batch is drawn before the folder is made: what can go wrong has gone wrong by then.
        seeds = range(seed, seed + len(texts))
        batches = draw(sampler, texts, seeds, batch_size, negative_prompt)
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
        save_grid(folder / "grid.png", pictures, f"{Path(model).name}{f' with {Path(lora).name}' if lora else ''}")
    console.print(f"{len(images)} pictures in {folder}, all of them in {folder / 'grid.png'}", soft_wrap=True)


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "picture"
