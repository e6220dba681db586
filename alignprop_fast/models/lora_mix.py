"""Several LoRA files in one pipeline, each with a weight that can be changed between pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignprop_fast.models.lora_merge import lora_file, lora_modules


def load_loras(pipe: Any, paths: Sequence[str | Path]) -> list[str]:
    """Put LoRA files (or folders with one) into the pipeline, switched off; returns their names there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or adapters for another model.
    """
    names = [f"lora_{i}" for i in range(len(paths))]
    for name, path in zip(names, paths, strict=True):
        file = lora_file(path)
        modules = lora_modules(file)
        try:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        except (ValueError, RuntimeError, KeyError) as error:
            raise _misfit(file) from error
        # diffusers passes over names that it does not know.
        if not all(_has(pipe, module, name) for module in modules):
            raise _misfit(file)
    set_lora_weights(pipe, {})
    return names


def set_lora_weights(pipe: Any, weights: Mapping[str, float]) -> None:
    """Let the pipeline be W + sum over `weights` of weight * (alpha / rank) B A; with none it is the base model."""
    if not pipe.get_list_adapters():
        return
    if not weights:
        pipe.disable_lora()
        return
    pipe.enable_lora()
    pipe.set_adapters(list(weights), list(weights.values()))


def _has(pipe: Any, module: str, name: str) -> bool:
    """Whether that adapter is in the module, such as unet.mid_block.attentions.0....to_q."""
    part, _, inner = module.partition(".")
    try:
        return name in pipe.components[part].get_submodule(inner).lora_A
    except (KeyError, AttributeError):
        return False


def _misfit(file: Path) -> ValueError:
    return ValueError(f"the adapters in {file} do not fit this model: load the model they were made for")
