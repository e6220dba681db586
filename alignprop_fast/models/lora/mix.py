"""Several LoRA files in one pipeline, each with a weight that can change between pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignprop_fast.models.lora.file import lora_file
from alignprop_fast.models.lora.load_save import load_new


def load_loras(pipe: Any, paths: Sequence[str | Path]) -> list[str]:
    """Put LoRA files (or folders with one) into the pipeline, switched off; returns their names there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged, or its adapters are for another model.
    """
    names = [f"lora_{i}" for i in range(len(paths))]
    for name, path in zip(names, paths, strict=True):
        load_new(pipe, lora_file(path), name)
    set_lora_weights(pipe, {})
    return names


def set_lora_weights(pipe: Any, weights: Mapping[str, float]) -> None:
    """Set the weights to W + sum over `weights` of weight * (alpha / rank) B A; without any, to the base model's."""
    if not pipe.get_list_adapters():
        return
    if not weights:
        pipe.disable_lora()
        return
    pipe.enable_lora()
    pipe.set_adapters(list(weights), list(weights.values()))
