"""Pipelines with random weights, written as folders in the real diffusers format.

Tests and benchmarks need small models without a download. These folders have the same files with the same names as the
published models, so everything that reads those (diffusers, this package, trl) reads these.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.making.random_weights import clip_and_t5, language_models
from alignprop_fast.making.random_weights.tokenizers import write_clip_tokenizer

PIPELINES: dict[str, Callable[..., Any]] = {
    "sd": clip_and_t5.sd,
    "sdxl": clip_and_t5.sdxl,
    "sd3": clip_and_t5.sd3,
    "flux": clip_and_t5.flux,
    "chroma": clip_and_t5.chroma,
    "z_image": language_models.z_image,
    "flux2_klein": language_models.flux2_klein,
    "flux2_dev": language_models.flux2_dev,
    "qwen_image": language_models.qwen_image,
    "krea2": language_models.krea2,
    "lumina2": language_models.lumina2,
    "sana": language_models.sana,
}


def make_folder(name: str, folder: str | Path, **options: Any) -> Path:
    """Write the pipeline of a name in `PIPELINES` with random fp32 weights and return its folder.

    options: those of its function. The weights are always the same, and the global
    random-number state does not change.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = PIPELINES[name](folder, **options)
    pipe.save_pretrained(folder)
    for part, component in pipe.components.items():
        if isinstance(component, CLIPTokenizer):
            _write_again(folder / part, component.pad_token)
        if isinstance(component, CLIPTextModel):
            _restore_prefix(folder / part / "model.safetensors")
    index = folder / "model_index.json"
    # Class names that transformers 4 knows too; the first is that of every published model.
    text = index.read_text(encoding="utf-8").replace('"T5Tokenizer"', '"T5TokenizerFast"')
    index.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")
    return folder


def _write_again(tokenizer: Path, pad_token: str) -> None:
    """transformers 5 writes CLIP tokenizers that transformers 4 cannot read."""
    for file in tokenizer.iterdir():
        file.unlink()
    write_clip_tokenizer(tokenizer, pad_token)


def _restore_prefix(file: Path) -> None:
    """Name CLIPTextModel's weights `text_model.*`, as in every published model; transformers 5 drops the prefix."""
    from safetensors.torch import load_file, save_file

    state = load_file(file)
    if not any(name.startswith("text_model.") for name in state):
        save_file({f"text_model.{name}": tensor for name, tensor in state.items()}, file, metadata={"format": "pt"})
