"""Read LoRA files in any naming and write them in diffusers' naming, without loading a model."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from alignprop_fast.models.load.folder import check_safetensors
from alignprop_fast.models.lora.factors import LEAVES_THE_BASE, Factors, Lora

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME = "adapter_model.safetensors"
METADATA_KEY = "lora_adapter_metadata"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # PEFT's names, which diffusers accepts for every kind of module

_TELLING = ("peft_type", "use_dora", "init_lora_weights")  # settings that can show that a file is not a plain LoRA


def lora_file(path: str | Path) -> Path:
    """The safetensors file at a path: the file itself, or the one in a folder under diffusers' or PEFT's name.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path).expanduser()
    files = [path / name for name in (WEIGHTS_NAME, PEFT_NAME)] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {path}: give a LoRA file (.safetensors) or its folder")
    return file


def read_lora(path: str | Path, pipe: Any = None) -> Lora:
    """The modules of a LoRA file (or folder) in any naming, with factors in fp32. Without an alpha the scale is 1.

    pipe: the pipeline that the file is for. Every name in the file must match one of its layers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds another kind of adapter, a name matches no layer, two names match the
            same layer, or factors do not fit each other.
    """
    from safetensors import safe_open

    from alignprop_fast.models.lora.keys import check_kind

    file = lora_file(path)
    keys = lora_keys(file)
    check_kind(keys, file)
    with safe_open(file, framework="pt") as stream:
        tensors = {key: stream.get_tensor(key).float() for key in keys}
        text = (stream.metadata() or {}).get(METADATA_KEY)
    config = _settings(file, text)
    if any(key.startswith("base_model.model.") for key in keys) and not any(key.endswith(".alpha") for key in keys):
        config |= _peft_settings(file)
    return lora_of(tensors, file, config, pipe)


def lora_keys(file: Path) -> list[str]:
    """The names of a file's tensors. Raises ValueError if the file is damaged."""
    from safetensors import safe_open

    check_safetensors(file)
    with safe_open(file, framework="pt") as stream:
        return list(stream.keys())


def is_kohya(file: Path) -> bool:
    """Whether a LoRA file is in kohya's naming. Raises ValueError if the file is damaged."""
    return any(key.endswith(".lora_down.weight") for key in lora_keys(file))


def lora_of(
    tensors: Mapping[str, torch.Tensor],
    file: Path,
    config: Mapping[str, Any] = MappingProxyType({}),
    pipe: Any = None,
) -> Lora:
    """The modules of a file's tensors. `file` is for messages; the rest, and the errors, as in `read_lora`."""
    from alignprop_fast.models.lora.keys import pairs
    from alignprop_fast.models.lora.kohya_names import split
    from alignprop_fast.models.lora.names import check_published, check_shapes, find_modules

    held = pairs(tensors, file)
    raw = {name: make_factors(file, name, pair.down, pair.up, 1.0) for name, pair in held.items()}
    lora: Lora = {}
    names: dict[str, str] = {}  # of each module in the file
    for name, modules in find_modules({name: one.places for name, one in raw.items()}, file, pipe).items():
        scale = _scale(file, modules[0], raw[name].rank, held[name].alpha, config)
        for module, factors in split(name, modules, replace(raw[name], scale=scale), file).items():
            if module in lora:
                raise ValueError(f"{file} has both {names[module]!r} and {name!r} for {module}: keep one of them")
            lora[module], names[module] = factors, name
    if pipe is None:
        check_published(lora, names, file)
    else:
        check_shapes(lora, file, pipe)
    if any(factors.scale == 0 for factors in lora.values()):
        logger.warning("%s has alpha 0 for some layers: they change nothing, as in diffusers", file)
    return lora


def make_factors(file: Path, module: str, down: torch.Tensor | None, up: torch.Tensor | None, scale: float) -> Factors:
    """Factors of one module of a file. Raises ValueError if they do not fit each other or are not finite."""
    if down is None or up is None:
        side = "up" if up is None else "down"
        raise ValueError(
            f"the factors of {module} in {file} do not fit each other, the LoRA factor {side} is missing: copy or save "
            "the file again"
        )
    if min(up.dim(), down.dim()) < 2 or up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1:
        raise ValueError(f"the factors of {module} in {file} do not fit each other: copy or save the file again")
    if not (down.isfinite().all() and up.isfinite().all()):
        raise ValueError(f"the factors of {module} in {file} are not finite: take an earlier checkpoint")
    return Factors(down, up, scale)


def _peft_settings(file: Path) -> dict[str, Any]:
    """Settings such as `lora_alpha` from the adapter_config.json that PEFT writes beside a file."""
    beside = file.with_name("adapter_config.json")
    if beside.is_file():
        return _settings(beside, beside.read_text(encoding="utf-8"))
    logger.warning("%s has no adapter_config.json beside it: alpha is assumed to equal the rank", file)
    return {}


def _settings(file: Path, text: str | None) -> dict[str, Any]:
    """The adapters' settings from the header that diffusers writes, such as `unet.lora_alpha`."""
    try:
        settings = json.loads(text) if text else {}
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"the LoRA settings in {file} are damaged: copy it again")
    of = {name: [settings[key] for key in settings if key.rpartition(".")[2] == name] for name in _TELLING}
    kind = "DoRA" if any(of["use_dora"]) else next((kind for kind in of["peft_type"] if kind != "LORA"), None)
    if kind:
        raise ValueError(f"{file} is a {kind}, whose deltas have another form: give plain LoRA files")
    for start in of["init_lora_weights"]:
        if start not in LEAVES_THE_BASE:
            raise ValueError(
                f"{file} has init_lora_weights={start!r}, which changed the base model: save it again as a plain LoRA, "
                "with path_initial_model_for_weight_conversion of PEFT's save_pretrained"
            )
    return settings


def _scale(file: Path, module: str, rank: int, tensor: torch.Tensor | None, config: Mapping[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank) of rank-stabilised LoRA, by PEFT's own rules for patterns."""
    from peft.utils.other import get_pattern_key

    part, _, name = module.partition(".")
    settings = {key: config.get(f"{part}.{key}", config.get(key)) for key in ("lora_alpha", "alpha_pattern")}
    alphas = settings["alpha_pattern"] or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), settings["lora_alpha"])
    if tensor is not None:
        alpha = tensor.item() if tensor.numel() == 1 else math.nan
    alpha = rank if alpha is None else alpha
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"the alpha of {module} in {file} is not a finite number: copy or save the file again")
    is_stabilised = config.get(f"{part}.use_rslora", config.get("use_rslora"))
    return alpha / math.sqrt(rank) if is_stabilised else alpha / rank


def lora_content(lora: Lora, metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`.

    Factors are not changed. The header holds each module's scale as its alpha.
    """
    from safetensors.torch import save

    # A UNet's attention gets diffusers' older names, which all its versions read. In a file with names of both kinds
    # its loader would skip the older ones.
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0")
    is_attention = all(module.startswith("unet.") and module.endswith(ends) for module in lora)
    down, up = (".lora.down.weight", ".lora.up.weight") if is_attention else (DOWN, UP)
    tensors = {}
    for module, pair in lora.items():
        tensors[module + down], tensors[module + up] = pair.down.cpu().contiguous(), pair.up.cpu().contiguous()
    header = {"format": "pt", **(metadata or {}), METADATA_KEY: json.dumps(_written_config(lora), sort_keys=True)}
    return with_metadata(save(tensors), header)


def _written_config(lora: Lora) -> dict[str, Any]:
    """PEFT's settings for each part of the pipeline, with only the fields that every version of PEFT has."""
    config: dict[str, Any] = {}
    for part in sorted({module.partition(".")[0] for module in lora}):
        # Text encoders without the prefix that transformers 5 dropped: PEFT also matches the end of a name.
        prefix = f"{part}."
        held = {
            module.removeprefix(prefix).removeprefix("text_model."): factors
            for module, factors in lora.items()
            if module.partition(".")[0] == part
        }
        # ^ matches the whole name, because one module's name can be the end of another's.
        start = "" if part.startswith("text_encoder") else "^"
        rank, ranks = _pattern({start + name: factors.rank for name, factors in held.items()})
        alpha, alphas = _pattern({start + name: factors.scale * factors.rank for name, factors in held.items()})
        settings = {"r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas}
        config |= {prefix + key: value for key, value in settings.items()}
        config[f"{part}.target_modules"] = sorted(held)
    return config


def _pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most frequent value, and the entries that differ from it."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {name: value for name, value in values.items() if value != common}


def with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with metadata in a fixed order; the library's order changes from run to run.

    Format: length of the header (8 bytes, little endian), the header as JSON padded to a multiple of 8, the tensors.
    """
    length = int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
