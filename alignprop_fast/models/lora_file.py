"""LoRA files: what is in them, in diffusers' naming or kohya's, and writing them in diffusers'. No model is loaded."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.models.load_folder import check_safetensors

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
LEAVES_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")  # of PEFT's initialisations
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # PEFT's names, which diffusers takes for modules of any kind

_ATTENTION = {".lora.down.weight": DOWN, ".lora.up.weight": UP}  # as diffusers and `save_lora` write attention
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "Tucker",
}


@dataclass(frozen=True)
class Factors:
    """One module's delta = scale * up @ down. down: [rank, in] or [rank, in, kh, kw]; up: [out, rank] or
    [out, rank, 1, 1]; scale: alpha / rank, or what stands for it."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def places(self) -> tuple[int, ...]:
        """What deltas of one module have in common: [out, in] or [out, in, kh, kw]."""
        return (self.up.shape[0], *self.down.shape[1:])

    def scaled_up(self) -> torch.Tensor:
        """`up` with the scale in it."""
        return self.up if self.scale == 1 else self.scale * self.up

    def delta(self) -> torch.Tensor:
        """scale * up @ down, of shape `places`."""
        return (self.scaled_up().flatten(1) @ self.down.flatten(1)).reshape(self.places)


Lora = dict[str, Factors]  # by the module's name in diffusers, such as unet.mid_block.attentions.0....to_q


def lora_file(path: str | Path) -> Path:
    """The safetensors file that a user means: a file, or a folder with `pytorch_lora_weights.safetensors` in it.

    Raises:
        FileNotFoundError: neither.
    """
    path = Path(path).expanduser()
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {path}: give a LoRA file (.safetensors) or the folder it is in")
    return file


def read_lora(path: str | Path) -> Lora:
    """The modules of a LoRA file (or folder), factors in fp32. A file that names no alpha has scale 1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, another kind of adapter, names of no known kind, or factors that do not fit each
            other.
    """
    from safetensors import safe_open

    from alignprop_fast.models.lora_kohya_names import from_kohya

    file = lora_file(path)
    if is_kohya(file):
        with safe_open(file, framework="pt") as stream:
            tensors = {key: stream.get_tensor(key).float() for key in stream.keys()}  # noqa: SIM118  # no mapping
        lora = from_kohya(tensors, file)
    else:
        modules = _modules(file)
        with safe_open(file, framework="pt") as stream:
            tensors = {_name(key): stream.get_tensor(key).float() for key in stream.keys()}  # noqa: SIM118
            config = _config(file, (stream.metadata() or {}).get(METADATA_KEY))
        lora = {}
        for module in modules:
            down, up = tensors[module + DOWN], tensors.get(module + UP)
            lora[module] = make_factors(file, module, down, up, _scale(module, down.shape[0], config))
    return lora


def is_kohya(file: Path) -> bool:
    """Whether the names in a LoRA file are kohya's.

    Raises:
        ValueError: a damaged file, or an adapter of another kind than LoRA.
    """
    from safetensors import safe_open

    check_safetensors(file)
    with safe_open(file, framework="pt") as stream:
        names = list(stream.keys())
    for word, kind in _OTHER_KINDS.items():
        if any(word in name for name in names):
            raise ValueError(f"{file} is a {kind}, whose deltas are of another form: give plain LoRA files")
    return any(name.endswith(".lora_down.weight") for name in names)


def make_factors(file: Path, module: str, down: torch.Tensor, up: torch.Tensor | None, scale: float) -> Factors:
    """Factors of one module of a file. Raises ValueError where they do not fit each other or are not finite."""
    if up is None or min(up.dim(), down.dim()) < 2 or up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1:
        raise ValueError(f"the factors of {module} in {file} do not fit each other: copy or save the file anew")
    if not (down.isfinite().all() and up.isfinite().all()):
        raise ValueError(f"the factors of {module} in {file} are not finite: take an earlier checkpoint")
    return Factors(down, up, scale)


def _modules(file: Path) -> list[str]:
    """Names of the modules that a file in diffusers' naming is for. Raises ValueError as `read_lora`."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stream:
        names = {_name(key) for key in stream.keys()}  # noqa: SIM118  # no mapping
    modules = sorted(name.removesuffix(DOWN) for name in names if name.endswith(DOWN))
    strange = names - {module + suffix for module in modules for suffix in (DOWN, UP)}
    if strange or not modules:
        what = f"has {min(strange)!r}, which is" if strange else "holds"
        raise ValueError(
            f"{file} {what} no LoRA factor in diffusers' or kohya's naming: give a file that train, diffusers or "
            "kohya's scripts saved"
        )
    return modules


def _name(key: str) -> str:
    # As transformers 5 names CLIP, where every other version has `text_model`.
    key = re.sub(r"^(text_encoder\w*)\.encoder\.", r"\1.text_model.encoder.", key)
    for theirs, ours in _ATTENTION.items():
        if key.endswith(theirs):
            return key.removesuffix(theirs) + ours
    return key


def _config(file: Path, text: str | None) -> dict[str, Any]:
    """The adapters' configuration that diffusers writes into the header: `unet.lora_alpha` and the like."""
    try:
        config = json.loads(text) if text else {}
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"the LoRA settings in the header of {file} are damaged: copy it again")
    if any(config.get(key) for key in config if key.endswith(".use_dora")):
        raise ValueError(f"{file} is a DoRA, whose deltas are of another form: give plain LoRA files")
    for key, value in config.items():
        if key.endswith("init_lora_weights") and value not in LEAVES_THE_BASE:
            raise ValueError(
                f"{file} was made with init_lora_weights={value!r}, whose base model is another: convert it by PEFT's "
                "save_pretrained(path_initial_model_for_weight_conversion=...)"
            )
    return config


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank) of rank-stabilised LoRA, by PEFT's own rules for patterns."""
    from peft.utils.other import get_pattern_key

    part, _, name = module.partition(".")
    alphas = config.get(f"{part}.alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.get(f"{part}.lora_alpha", rank))
    return alpha / math.sqrt(rank) if config.get(f"{part}.use_rslora") else alpha / rank


def lora_content(lora: Lora, metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`: factors as they are, each
    module's scale as its alpha in the header."""
    from safetensors.torch import save

    # A UNet's attention has diffusers' older names, which all its versions read. Of a file with names of both kinds its
    # loader would leave the older ones out.
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0")
    is_attention = all(module.startswith("unet.") and module.endswith(ends) for module in lora)
    down, up = (".lora.down.weight", ".lora.up.weight") if is_attention else (DOWN, UP)
    tensors = {}
    for module, pair in lora.items():
        tensors[module + down], tensors[module + up] = pair.down.cpu().contiguous(), pair.up.cpu().contiguous()
    header = {"format": "pt", **(metadata or {}), METADATA_KEY: json.dumps(_written_config(lora), sort_keys=True)}
    return with_metadata(save(tensors), header)


def _written_config(lora: Lora) -> dict[str, Any]:
    """PEFT's settings for each part of the pipeline, of fields alone that every version of PEFT has."""
    config: dict[str, Any] = {}
    for part in sorted({module.partition(".")[0] for module in lora}):
        # Of a text encoder without the prefix that transformers 5 has done away with: PEFT takes the end of a name too.
        prefix = f"{part}."
        held = {
            module.removeprefix(prefix).removeprefix("text_model."): factors
            for module, factors in lora.items()
            if module.partition(".")[0] == part
        }
        # ^: the whole name, where one module's name may be the end of another's.
        start = "" if part.startswith("text_encoder") else "^"
        rank, ranks = _pattern({start + name: factors.rank for name, factors in held.items()})
        alpha, alphas = _pattern({start + name: factors.scale * factors.rank for name, factors in held.items()})
        settings = {"r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas}
        config |= {prefix + key: value for key, value in settings.items()}
        config[f"{part}.target_modules"] = sorted(held)
    return config


def _pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and what differs from it."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {name: value for name, value in values.items() if value != common}


def with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with that metadata in a fixed order; the library's own order changes from run to run.

    Format: 8 bytes length of the header (little endian), the header in JSON padded to a multiple of 8, the tensors.
    """
    length = int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
