"""Save LoRA adapters (Hu et al. 2021) of a diffusers pipeline, and load them with PEFT."""

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

    The adapter is the one of that name, or the one that `the_adapter` finds. The file holds its factors in the denoiser
    and in text encoders, with the strength that it has in the pipeline. The file is read back before it gets its final
    name, so it is either complete or absent. `metadata` goes into its header, beside the adapter's configuration.

    Raises:
        ValueError: the denoiser has no adapters, there are several to choose from, or the adapter does not fit a LoRA
            file.
    """
    lora = adapter_factors(pipe, the_adapter(pipe, adapter))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / WEIGHTS_NAME) as temporary:
        temporary.write_bytes(lora_content(lora, metadata))
        if not _equal(read_lora(temporary, pipe), lora):
            raise ValueError(f"{temporary} reads back differently from what was written: save into another folder")
    return folder / WEIGHTS_NAME


def _equal(one: Lora, two: Lora) -> bool:
    """Whether two adapters are the same; factors are compared to the bit."""
    return _fits(one, two) and all(
        torch.equal(one[module].down, two[module].down.float().cpu())
        and torch.equal(one[module].up, two[module].up.float().cpu())
        for module in one
    )


def _fits(one: Lora, two: Lora) -> bool:
    """Whether two adapters have the same modules, ranks and scales (up to the rounding of alpha / rank)."""
    return one.keys() == two.keys() and all(
        (one[module].down.shape, one[module].up.shape) == (two[module].down.shape, two[module].up.shape)
        and math.isclose(one[module].scale, two[module].scale)
        for module in one
    )


def load_lora(pipe: Any, path: str | Path, adapter: str | None = None) -> None:
    """Put the adapters of a LoRA file, or of `path/pytorch_lora_weights.safetensors`, into the pipeline.

    If the denoiser already has adapters, the values of one are overwritten in place, so that an optimizer keeps its
    parameters. It is the adapter of that name, or the one that `the_adapter` finds. Otherwise this does the same as
    `pipe.load_lora_weights`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its adapters have another kind, shape, scale or other modules.
    """
    file = lora_file(path)
    if not has_lora(pipe):
        load_new(pipe, file, adapter)
    elif is_kohya(file):
        raise ValueError(f"{file} is in kohya's naming, but the denoiser already has adapters: give {WEIGHTS_NAME}")
    else:
        _overwrite(pipe, file, the_adapter(pipe, adapter))


def load_new(pipe: Any, file: Path, name: str | None = None) -> Lora:
    """Add the adapters of a LoRA file, in any naming that `read_lora` knows, to the pipeline; returns them.

    name: of the adapter in the pipeline. None: diffusers chooses one that is free.

    Raises:
        ValueError: as `load_lora`.
    """
    lora = read_lora(file, pipe)
    try:
        # In our own naming: diffusers reads only a part of other files, and their header may change the base model.
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / WEIGHTS_NAME).write_bytes(lora_content(lora))
            pipe.load_lora_weights(folder, weight_name=WEIGHTS_NAME, adapter_name=name)
    except (ValueError, RuntimeError, KeyError) as error:
        raise _misfit(file) from error
    lost = [module for module in lora if not _has(pipe, module, name)]
    if lost:
        raise ValueError(f"diffusers loads no adapters for {listed(lost)}: replace {file} by a file without them")
    return lora


def _has(pipe: Any, module: str, name: str | None) -> bool:
    """Whether that adapter (or any) is in the module, such as unet.mid_block.attentions.0....to_q."""
    part, _, inner = module.partition(".")
    # One text encoder of transformers 5 has no `text_model`.
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
            f"the adapters in {file} have another rank, scale or other modules: use their LoRA rank, alpha and targets"
        )
    set_factors(pipe, name, theirs)


def set_factors(pipe: Any, name: str, lora: Lora) -> None:
    """Overwrite the values of an adapter in place; PEFT's loader would create parameters unknown to an optimizer."""
    mine = adapter_factors(pipe, name)
    for module, pair in lora.items():
        mine[module].down.copy_(pair.down)
        mine[module].up.copy_(pair.up)
