"""LoRA files mixed linearly in the weight delta: of the files alone, no model is loaded.

    delta = sum_i w_i s_i B_i A_i        s_i = alpha_i / rank_i of the file, w_i the weight asked for

Exact by stacking: A = [A_1; A_2; ...], B = [w_1 s_1 B_1, w_2 s_2 B_2, ...], whose rank is the sum of the ranks. Or
re-factored to a given rank by truncated SVD, the best there is in the Frobenius norm (Eckart and Young 1936): with
B = Q_b R_b and A^T = Q_a R_a only the small R_b R_a^T is decomposed, and delta is never formed.

PEFT's `add_weighted_adapter` does the same between adapters that a model carries: it needs the base model, decomposes
the full delta, pads every module to one rank and reports no error.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.models.load_folder import check_safetensors
from alignprop_fast.models.lora import WEIGHTS_NAME, with_metadata

_METADATA_KEY = "lora_adapter_metadata"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"  # PEFT's names, which diffusers takes for modules of any kind
_ATTENTION = {".lora.down.weight": _DOWN, ".lora.up.weight": _UP}  # as diffusers and `save_lora` write attention


@dataclass(frozen=True)
class Factors:
    """One module's delta = up @ down, both fp32. down: [rank, in] or [rank, in, kh, kw]; up: [out, rank] or
    [out, rank, 1, 1]. The scale is in `up`."""

    down: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def places(self) -> tuple[int, ...]:
        """What deltas of one module have in common: [out, in] or [out, in, kh, kw]."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> torch.Tensor:
        """up @ down, of shape `places`."""
        return (self.up.flatten(1) @ self.down.flatten(1)).reshape(self.places)


Lora = dict[str, Factors]  # by the module's name in the file, such as unet.mid_block.attentions.0....to_q


@dataclass(frozen=True)
class Merged:
    """A mixture and what it lost: ||delta - kept|| / ||delta|| (Frobenius) of each module and of all together."""

    factors: Lora
    errors: dict[str, float]
    relative_error: float


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
    """The modules of a LoRA file (or folder) in diffusers' naming. A file that names no alpha has scale 1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, another kind of adapter, or factors that do not fit each other.
    """
    from safetensors import safe_open

    file = lora_file(path)
    modules = lora_modules(file)
    with safe_open(file, framework="pt") as stream:
        tensors = {_name(key): stream.get_tensor(key).float() for key in stream.keys()}  # noqa: SIM118  # no mapping
        header = stream.metadata() or {}
    config = _config(file, header.get(_METADATA_KEY))
    return {module: _factors(file, module, tensors, config) for module in modules}


def lora_modules(file: Path) -> list[str]:
    """Names of the modules that a LoRA file is for, from its header alone.

    Raises:
        ValueError: a damaged file, or something else than LoRA in diffusers' naming.
    """
    from safetensors import safe_open

    check_safetensors(file)
    with safe_open(file, framework="pt") as stream:
        names = {_name(key) for key in stream.keys()}  # noqa: SIM118  # no mapping
    modules = sorted(name.removesuffix(_DOWN) for name in names if name.endswith(_DOWN))
    strange = names - {module + suffix for module in modules for suffix in (_DOWN, _UP)}
    if strange or not modules:
        what = f"has {min(strange)!r}, which is" if strange else "holds"
        raise ValueError(
            f"{file} {what} no LoRA factor in diffusers' naming: give a file that train or diffusers saved"
        )
    return modules


def _name(key: str) -> str:
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
        raise ValueError(f"{file} is a DoRA, whose deltas do not add up: give plain LoRA files")
    return config


def _factors(file: Path, module: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Factors:
    down, up = tensors[module + _DOWN], tensors.get(module + _UP)
    if up is None or min(up.dim(), down.dim()) < 2 or up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1:
        raise ValueError(f"the factors of {module} in {file} do not fit each other: copy or save the file anew")
    if not (down.isfinite().all() and up.isfinite().all()):
        raise ValueError(f"the factors of {module} in {file} are not finite: take an earlier checkpoint")
    return Factors(down, up * _scale(module, down.shape[0], config))


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank) of rank-stabilised LoRA, by PEFT's own rules for patterns."""
    from peft.utils.other import get_pattern_key

    part, _, name = module.partition(".")
    alphas = config.get(f"{part}.alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.get(f"{part}.lora_alpha", rank))
    return alpha / math.sqrt(rank) if config.get(f"{part}.use_rslora") else alpha / rank


def merge_loras(loras: Sequence[tuple[Lora, float]], rank: int | None = None) -> Merged:
    """sum_i weight_i delta_i, exact, or at most of that rank. A module that an adapter lacks counts as zero there.

    Raises:
        ValueError: weights that are not finite or all zero, a rank below 1, adapters without a module in common or
            with one of different shapes.
    """
    _check(loras, rank)
    used = [(lora, weight) for lora, weight in loras if weight != 0]
    factors: Lora = {}
    kept_squared: dict[str, tuple[float, float]] = {}  # lost and whole squared norm of each module
    for module in sorted({name for lora, _ in used for name in lora}):
        stacked = _stacked([(lora[module], weight) for lora, weight in used if module in lora])
        factors[module], kept_squared[module] = (stacked, (0.0, 1.0)) if rank is None else _truncated(stacked, rank)
    errors = {module: math.sqrt(lost / whole) if whole else 0.0 for module, (lost, whole) in kept_squared.items()}
    lost, whole = (sum(pair[i] for pair in kept_squared.values()) for i in (0, 1))
    return Merged(factors, errors, math.sqrt(lost / whole) if whole else 0.0)


def _check(loras: Sequence[tuple[Lora, float]], rank: int | None) -> None:
    weights = [weight for _, weight in loras]
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"the weights {weights} are not all finite: use numbers such as 0.5")
    if not any(weights):
        raise ValueError("every weight is 0, which is the base model: give one that is not")
    if rank is not None and rank < 1:
        raise ValueError(f"the rank is {rank}: use at least 1")
    if not set.intersection(*(set(lora) for lora, _ in loras)):
        raise ValueError("the adapters have no module in common: merge adapters of the same model")
    seen: dict[str, tuple[int, ...]] = {}
    for lora, _ in loras:
        for module, factors in lora.items():
            if seen.setdefault(module, factors.places) != factors.places:
                raise ValueError(
                    f"{module} has {_shape(seen[module])} weights in one adapter and {_shape(factors.places)} in "
                    "another: merge adapters of the same model"
                )


def _shape(places: Sequence[int]) -> str:
    return " x ".join(map(str, places))


def _stacked(parts: Sequence[tuple[Factors, float]]) -> Factors:
    downs = torch.cat([factors.down for factors, _ in parts])
    return Factors(downs, torch.cat([weight * factors.up for factors, weight in parts], dim=1))


def _truncated(factors: Factors, rank: int) -> tuple[Factors, tuple[float, float]]:
    """The nearest delta of that rank, and the squared Frobenius norms of what is lost and of the whole."""
    # In float64: the error of a rank that suffices is a difference of nearly equal numbers.
    q_up, r_up = torch.linalg.qr(factors.up.flatten(1).double())
    q_down, r_down = torch.linalg.qr(factors.down.flatten(1).double().T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    up = (q_up @ (u[:, :rank] * root)).reshape(-1, rank, *factors.up.shape[2:])
    down = ((v[:rank] * root[:, None]) @ q_down.T).reshape(rank, *factors.down.shape[1:])
    squared = s.square()
    return Factors(down.float(), up.float()), (float(squared[rank:].sum()), float(squared.sum()))


def merged_file(factors: Lora, metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`, with scale 1 everywhere."""
    from safetensors.torch import save

    tensors = {}
    for module, pair in factors.items():
        tensors[module + _DOWN], tensors[module + _UP] = pair.down.contiguous(), pair.up.contiguous()
    header = {"format": "pt", **(metadata or {}), _METADATA_KEY: json.dumps(_written_config(factors), sort_keys=True)}
    return with_metadata(save(tensors), header)


def _written_config(factors: Lora) -> dict[str, Any]:
    """PEFT's settings for each part of the pipeline; alpha = rank everywhere, so that the scale is 1."""
    config: dict[str, Any] = {}
    for part in sorted({module.partition(".")[0] for module in factors}):
        ranks = {m.partition(".")[2]: f.rank for m, f in factors.items() if m.partition(".")[0] == part}
        common = Counter(ranks.values()).most_common(1)[0][0]
        # ^: the whole name, where one module's name may be the end of another's.
        other = {f"^{name}": rank for name, rank in ranks.items() if rank != common}
        fields = {"r": common, "lora_alpha": common, "target_modules": sorted(ranks)}
        fields |= {"rank_pattern": other, "alpha_pattern": other}
        config |= {f"{part}.{key}": value for key, value in fields.items()}
    return config
