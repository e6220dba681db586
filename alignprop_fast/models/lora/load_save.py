"""LoRA adapters (Hu et al. 2021) in a diffusers pipeline, over PEFT: new ones, trained ones, and their files."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.files import whole
from alignprop_fast.models.lora.adapters import (
    adapter_factors,
    has_lora,
    the_adapter,
)
from alignprop_fast.models.lora.factors import Lora
from alignprop_fast.models.lora.file import WEIGHTS_NAME, is_kohya, lora_content, lora_file, read_lora
from alignprop_fast.models.lora.keys import listed


def save_lora(
    pipe: Any, folder: str | Path, metadata: dict[str, str] | None = None, adapter: str | None = None
) -> Path:
    """Write an adapter to `folder/pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)`.

    It is the one of that name, or the one that `the_adapter` finds: with what it adds in the denoiser and in text
    encoders, at the strength that it has in the pipeline. The file is read back before it gets its name, and is there
    whole or not at all. `metadata` goes into its header, beside the adapter's own configuration.

    Raises:
        ValueError: a denoiser without adapters, several to choose from, or one that fits no LoRA file.
    """
    lora = adapter_factors(pipe, the_adapter(pipe, adapter))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / WEIGHTS_NAME) as temporary:
        temporary.write_bytes(lora_content(lora, metadata))
        if not _equal(read_lora(temporary, pipe), lora):
            raise ValueError(f"{temporary} does not read back as it was written: save into another folder")
    return folder / WEIGHTS_NAME


def _equal(one: Lora, two: Lora) -> bool:
    """Whether two adapters are the same, factors to the bit."""
    return _fits(one, two) and all(
        torch.equal(one[module].down, two[module].down.float().cpu())
        and torch.equal(one[module].up, two[module].up.float().cpu())
        for module in one
    )


def _fits(one: Lora, two: Lora) -> bool:
    """Whether two adapters have the same places, ranks and scales; alpha / rank is one more rounding."""
    return one.keys() == two.keys() and all(
        (one[module].down.shape, one[module].up.shape) == (two[module].down.shape, two[module].up.shape)
        and math.isclose(one[module].scale, two[module].scale)
        for module in one
    )


def load_lora(pipe: Any, path: str | Path, adapter: str | None = None) -> None:
    """Put the adapters of a LoRA file, or of `path/pytorch_lora_weights.safetensors`, into the pipeline.

    Where the denoiser has adapters already, the values of one are overwritten in place, so that an optimizer keeps its
    hold on them: of that name, or the one that `the_adapter` finds. Otherwise this is `pipe.load_lora_weights`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or adapters of another kind, shape or scale, or in other places.
    """
    file = lora_file(path)
    if not has_lora(pipe):
        load_new(pipe, file, adapter)
    elif is_kohya(file):
        raise ValueError(f"{file} is in kohya's naming, and the denoiser has adapters already: give {WEIGHTS_NAME}")
    else:
        _overwrite(pipe, file, the_adapter(pipe, adapter))


def load_new(pipe: Any, file: Path, name: str | None = None) -> Lora:
    """Give the pipeline the adapters of a LoRA file, in any naming that `read_lora` knows; returns them.

    name: of the adapter in the pipeline; None: one that is free, of diffusers' choice.

    Raises:
        ValueError: as `load_lora`.
    """
    lora = read_lora(file, pipe)
    try:
        # As we write it: of others diffusers reads a part, and a header may ask for what changes the base model.
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / WEIGHTS_NAME).write_bytes(lora_content(lora))
            pipe.load_lora_weights(folder, weight_name=WEIGHTS_NAME, adapter_name=name)
    except (ValueError, RuntimeError, KeyError) as error:
        raise _misfit(file) from error
    lost = [module for module in lora if not _has(pipe, module, name)]
    if lost:
        raise ValueError(f"diffusers loads no adapters of {listed(lost)}: give a file without them in place of {file}")
    return lora


def _has(pipe: Any, module: str, name: str | None) -> bool:
    """Whether that adapter (or any) is in the module, such as unet.mid_block.attentions.0....to_q."""
    part, _, inner = module.partition(".")
    # transformers 5 has no `text_model` in one of its text encoders.
    for path in (inner, inner.removeprefix("text_model.")):
        try:
            held = pipe.components[part].get_submodule(path).lora_A
        except (KeyError, AttributeError):
            continue
        return bool(held) if name is None else name in held
    return False


def _misfit(file: Path) -> ValueError:
    return ValueError(f"the adapters in {file} do not fit this model: load the model they were made for")


def _overwrite(pipe: Any, file: Path, name: str) -> None:
    mine, theirs = adapter_factors(pipe, name), read_lora(file, pipe)
    if not _fits(mine, theirs):
        raise ValueError(
            f"the adapters in {file} have another rank, scale or other places: use the LoRA rank and alpha they have"
        )
    set_factors(pipe, name, theirs)


def set_factors(pipe: Any, name: str, lora: Lora) -> None:
    """Give modules of an adapter that is there these values, in place: PEFT's own loader puts new parameters in, which
    an optimizer would not know."""
    mine = adapter_factors(pipe, name)
    for module, pair in lora.items():
        mine[module].down.copy_(pair.down)
        mine[module].up.copy_(pair.up)
