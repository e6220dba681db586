"""The command `merge`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.merge_path import AdapterPath
from alignprop_fast.cli.options import command_line
from alignprop_fast.cli.pipeline import START_ANEW, PictureProgress, open_pipeline, open_reward, open_sampler
from alignprop_fast.cli.screen import make_console
from alignprop_fast.cli.support import pick_device, quiet_libraries, run_errors, setup_errors
from alignprop_fast.files import whole
from alignprop_fast.training.declaration import Command, Panel, like, option
from alignprop_fast.training.options import InputOptions, PictureOptions

if TYPE_CHECKING:
    from alignprop_fast.models.lora.merge import Merged


@dataclass
class MergeOptions(PictureOptions):
    """Options of `merge`."""

    adapters: tuple[str, ...] = option(
        (),
        "Output folders of train, or LoRA files (.safetensors with the names of diffusers, kohya, PEFT or ComfyUI), "
        "each with its weight; 1 if it has none.",
        commands=Command.MERGE,
        argument="ADAPTER:WEIGHT",
    )
    rank: int | None = option(
        None,
        "Reduce the mixture to this rank, with the smallest possible error; the error is reported.",
        commands=Command.MERGE,
        shown="exact: the sum of the ranks",
        at_least=1,
    )
    path_steps: int | None = option(
        None,
        "Also draw path.png: 8 of the prompts at this many places between two adapters, (1 - t) A + t B, t from 0 to "
        "1, whatever their weights.",
        Panel.PATH,
        commands=Command.MERGE,
        shown="none",
        at_least=2,
        at_most=32,
    )
    reward: str = like(
        InputOptions,
        "reward",
        "",
        help="Reward as in train --reward. It is written under each picture of the path, and to path.csv.",
        panel=Panel.PATH,
        commands=Command.MERGE,
        shown="none",
    )


@command_line(Command.MERGE, MergeOptions(output_dir="alignprop-merged"))
def merge(ctx: typer.Context, options: MergeOptions) -> None:
    """Mix adapters linearly, or scale one toward the base model.

    Writes pytorch_lora_weights.safetensors (for diffusers' load_lora_weights), kohya_lora_weights.safetensors (for
    ComfyUI and others) and merge.json (weights, ranks, relative Frobenius errors) to --output-dir. A model is loaded
    only for the pictures of --path-steps.

    **Examples**

    - `alignprop-fast merge clip-run:0.5 colorfulness-run:0.5 --output-dir both`
    - `alignprop-fast merge run:0.7 --rank 4 --output-dir milder`
    - `alignprop-fast merge clip-run:0.5 colorfulness-run:0.5 --path-steps 5 --reward clip --output-dir path`
    """
    console, taken = make_console(), ctx.with_resource(OutputFolder(options.output_dir))
    folder, path = taken.path, None
    with setup_errors():
        quiet_libraries(console)
        from alignprop_fast.models.lora.file import read_lora
        from alignprop_fast.models.lora.merge import merge_loras

        taken.check_new()
        mixture = [_split(adapter) for adapter in options.adapters]
        _check(mixture, options)
        merged = merge_loras([(read_lora(source), weight) for source, weight in mixture], options.rank)
        contents = _contents(merged, mixture, options.rank)
        if options.path_steps is not None:
            path = _open_path(options, options.path_steps, [source for source, _ in mixture])
            # The first batch is drawn before anything is written, to meet all errors by then.
            batches = path.batches(options.batch_size, options.negative_prompt)
            first = next(batches)
    taken.begin()
    with run_errors(folder, START_ANEW):
        if path is not None:
            with PictureProgress(console, len(path.rows) * len(path.places)) as progress:
                for count in chain([first], batches):
                    progress.advance(count)
        _write(folder, contents)
        if path is not None:
            path.write(folder, [Path(source).name for source, _ in mixture], options.reward)
            console.print(f"pictures: {folder / 'path.png'}", soft_wrap=True)
    _print(console, merged, options.rank)
    console.print(f"adapters: {folder / 'pytorch_lora_weights.safetensors'}", soft_wrap=True)
    console.print(f"          {folder / 'kohya_lora_weights.safetensors'} for ComfyUI and others", soft_wrap=True)


def _check(mixture: Sequence[tuple[str, float]], options: MergeOptions) -> None:
    if options.path_steps is None and (options.reward or options.reward_model):
        raise ValueError("--reward scores the pictures of a path: add --path-steps 5")
    if options.path_steps is not None and len(mixture) != 2:
        raise ValueError(f"--path-steps needs two adapters, and here are {len(mixture)}: give two")


def _open_path(options: MergeOptions, steps: int, sources: Sequence[str]) -> AdapterPath:
    """The path's pictures to draw, with the model and both adapters."""
    from alignprop_fast.models.lora.mix import load_loras
    from alignprop_fast.prompts.rows import load_rows

    rows, device = load_rows(options.prompts), pick_device(options.device)
    pipe = open_pipeline(options, device)
    names = load_loras(pipe, sources)
    sampler = open_sampler(options, pipe)
    reward = open_reward(options.reward, pipe, options.reward_model, options.allow_pickle) if options.reward else None
    path = AdapterPath(sampler, names, reward, rows, options.seed, steps)
    sampler.say_what_is_cut([row.prompt for row in path.rows], options.negative_prompt)
    return path


def _print(console: Console, merged: Merged, rank: int | None) -> None:
    ranks = sorted({factors.rank for factors in merged.factors.values()})
    console.print(
        f"{len(merged.factors)} modules of rank {' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}"
    )
    if rank is not None:
        worst = max(merged.errors, key=merged.errors.__getitem__)
        text = f"{merged.relative_error:.2%} overall, at most {merged.errors[worst]:.2%} ({worst})"
        console.print(f"relative error of the weight deltas: {text}", soft_wrap=True)
    if any(".encoder.block." in module for module in merged.factors):
        console.print("diffusers does not load adapters of T5; the files contain them for other programs")


def _split(adapter: str) -> tuple[str, float]:
    """`run:0.5` -> (run, 0.5). The weight is 1 if no number follows, or if the whole text is an existing path.

    Raises:
        ValueError: the text has two meanings, or the weight is not a number.
    """
    name, colon, last = adapter.rpartition(":")
    whole, before = (bool(path) and Path(path).expanduser().exists() for path in (adapter, name))
    try:
        weight = float(last) if colon and name else None
    except ValueError:
        weight = None
    if whole and before and weight is not None:
        raise ValueError(
            f"both {adapter} and {name} exist: write {adapter}:1 for the first, {name}:{weight:f} for the second"
        )
    if before and weight is None and not whole:
        raise ValueError(f"{last!r} in {adapter!r} is not a weight: write a number after the colon, such as {name}:0.5")
    return (adapter, 1.0) if whole or weight is None else (name, weight)


def _contents(merged: Merged, mixture: Sequence[tuple[str, float]], rank: int | None) -> dict[str, bytes]:
    """{name of a file: its content}. Raises ValueError if a module has no name in one of the formats."""
    from alignprop_fast.models.lora.file import WEIGHTS_NAME, lora_content
    from alignprop_fast.models.lora.kohya_file import KOHYA_NAME, kohya_content
    from alignprop_fast.version import __version__

    record = {
        "adapters": [{"path": path, "weight": weight} for path, weight in mixture],
        "rank": rank,
        "relative_error": merged.relative_error,
        "modules": {m: {"rank": f.rank, "relative_error": merged.errors[m]} for m, f in merged.factors.items()},
        "alignprop_fast": __version__,
    }
    mixed = " + ".join(f"{weight:g} {Path(path).name}" for path, weight in mixture)
    metadata = {"alignprop_merged": mixed}
    kohya = {**metadata, "ss_training_comment": f"merged: {mixed}", "modelspec.title": mixed}
    return {
        WEIGHTS_NAME: lora_content(merged.factors, metadata),
        KOHYA_NAME: kohya_content(merged.factors, kohya),
        "merge.json": (json.dumps(record, indent=1) + "\n").encode(),
    }


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files or none: an error such as a full disk comes before the first file gets its name."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        for name, content in contents.items():
            files.enter_context(whole(folder / name)).write_bytes(content)
