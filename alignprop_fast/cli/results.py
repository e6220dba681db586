"""The results of a run: the adapters with metadata under diffusers' and kohya's names, and a model card."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignprop_fast.report.pictures import Pictures
from alignprop_fast.training.declaration import Command, values
from alignprop_fast.training.options import TrainOptions

AVERAGED = "ema"  # folder of the averaged adapters, inside the run's folder
_NOT_FOR_OTHERS = ("output_dir", "device", "save_every", "sample_every", "log_with")


def write_adapters(pipe: Any, folder: Path, options: TrainOptions, prompts: Sequence[str], steps: int) -> None:
    """Write the adapters after `steps` optimizer steps, under diffusers' names and under kohya's."""
    from alignprop_fast.models.lora.kohya_file import kohya_metadata, save_kohya_lora
    from alignprop_fast.models.lora.load_save import save_lora
    from alignprop_fast.training.state import package_versions

    own = {
        "alignprop_reward": options.reward,
        "alignprop_steps": str(steps),
        "alignprop_base_model": shareable(options.model),
        "alignprop_prompts": shareable(options.prompts),
        "alignprop_trigger_words": "",
        "alignprop_versions": json.dumps(package_versions()),
    }
    save_lora(pipe, folder, own)
    kohya = kohya_metadata(
        pipe,
        base_model=shareable(options.model),
        title=f"{shareable(options.model)} aligned to {options.reward}",
        comment=f"AlignProp (alignprop_fast): {steps} steps on the reward {options.reward}",
        prompts=prompts,
        options={**values(options, Command.TRAIN), "steps": steps},
    )
    save_kohya_lora(pipe, folder, {**own, **kohya})


def remove_adapters(folder: Path) -> None:
    """Remove what `write_adapters` wrote, and the folder if nothing else is in it."""
    from alignprop_fast.models.lora.file import WEIGHTS_NAME
    from alignprop_fast.models.lora.kohya_file import KOHYA_NAME

    if not folder.is_dir():
        return
    for name in (WEIGHTS_NAME, KOHYA_NAME):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def check_adapters(pipe: Any) -> None:
    """Raises ValueError if `write_adapters` could not write the adapters, before the run and not after it."""
    from alignprop_fast.models.lora.adapters import adapter_factors, the_adapter
    from alignprop_fast.models.lora.kohya_file import to_kohya

    to_kohya(adapter_factors(pipe, the_adapter(pipe)), pipe)


def write_card(
    folder: Path,
    options: TrainOptions,
    prompts: Sequence[str],
    steps: int,
    before: Pictures,
    after: Pictures,
    averaged: bool,
) -> None:
    """Write README.md in the Hub's format. averaged: the later pictures were drawn with the adapters in `AVERAGED`."""
    from alignprop_fast.models.lora.kohya_file import KOHYA_NAME
    from alignprop_fast.report.model_card import Result, write_model_card

    scores = {"reward": (before.mean_reward, after.mean_reward)}
    if len(after.mean_parts) > 1:
        scores |= {name: (before.mean_parts[name], after.mean_parts[name]) for name in after.mean_parts}
    shown = {
        name: shareable(value) for name, value in values(options, Command.TRAIN).items() if name not in _NOT_FOR_OTHERS
    }
    write_model_card(
        folder,
        name=folder.name,
        base_model=options.model,
        dataset_name=None,
        tags={"alignprop", "reward-backpropagation", "lora", "text-to-image"},
        lora=True,
        options={**shown, "steps": steps},
        result=Result(
            shareable(options.model),
            options.reward,
            scores,
            len(after.images),
            tuple(prompts),
            "before_after.png",
            KOHYA_NAME,
            AVERAGED if averaged else "",
        ),
    )


def shareable(value: Any) -> Any:
    """Replaces paths by names, because paths mean something on one machine only; other texts stay."""
    if isinstance(value, list | tuple):
        return ", ".join(str(shareable(entry)) for entry in value)
    if isinstance(value, str) and "/" in value:
        name, equals, path = value.rpartition("=")
        return f"{name}{equals}{Path(path).name}" if os.path.exists(path) else value  # takes any text, unlike Path's
    return value
