"""Write adapters in kohya's naming and with kohya's metadata, for ComfyUI, Forge and others."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.files import write_whole
from alignprop_fast.models.lora.adapters import adapter_factors, the_adapter
from alignprop_fast.models.lora.factors import Factors, Lora
from alignprop_fast.models.lora.file import with_metadata
from alignprop_fast.models.lora.keys import listed
from alignprop_fast.models.lora.kohya_names import LAYOUTS, MLP_RATIO, PREFIX, swapped
from alignprop_fast.models.lora.names import families, family_of, published_names
from alignprop_fast.models.lora.targets import denoiser
from alignprop_fast.models.picture_size import native_size

KOHYA_NAME = "kohya_lora_weights.safetensors"
_TAGS = 100  # the most prompts that the metadata lists


def save_kohya_lora(
    pipe: Any, folder: str | Path, metadata: Mapping[str, str] | None = None, adapter: str | None = None
) -> Path:
    """Write the adapter that `save_lora` writes, as a whole file, to `folder/kohya_lora_weights.safetensors`.

    metadata: for the header.

    Raises:
        ValueError: as `save_lora`, or kohya's files have no name for a module.
    """
    content = kohya_content(adapter_factors(pipe, the_adapter(pipe, adapter)), metadata, pipe)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / KOHYA_NAME, content)
    return folder / KOHYA_NAME


def kohya_content(lora: Lora, metadata: Mapping[str, str] | None = None, pipe: Any = None) -> bytes:
    """The content of a `kohya_lora_weights.safetensors`. `pipe` and errors as in `to_kohya`."""
    from safetensors.torch import save

    lora = _of_one_alpha(lora)
    ranks = {factors.rank for factors in lora.values()}
    alpha = next(factors.scale * factors.rank for factors in lora.values())
    kind = ""
    if any(module.startswith("transformer.") for module in lora):
        kind = "_" + family_of(lora, pipe).replace("-", "")
    header = {
        "format": "pt",
        "ss_network_module": f"networks.lora{kind}",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(float(alpha)),
        **(metadata or {}),
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in to_kohya(lora, pipe).items()}
    return with_metadata(save(tensors), header)


def _of_one_alpha(lora: Lora) -> Lora:
    """The same deltas, all with the most frequent alpha: diffusers uses one alpha for all modules of such a file."""
    alpha = Counter(factors.scale * factors.rank for factors in lora.values()).most_common(1)[0][0] or 1.0
    one = {}
    for module, factors in lora.items():
        scale = alpha / factors.rank
        up = factors.up if math.isclose(scale, factors.scale) else factors.scale / scale * factors.up
        one[module] = Factors(factors.down, up, scale)
    return one


def kohya_metadata(
    pipe: Any, *, base_model: str, title: str, comment: str, prompts: Sequence[str], options: Mapping[str, Any]
) -> dict[str, str]:
    """Metadata that model managers show, with the keys of kohya's scripts (ss_*) and of Stability's specification.

    base_model, title: names, not paths.
    comment: how it was trained, in one line.
    prompts: the training prompts. They take the place of trigger words, of which there are none.
    options: any of steps, seed, learning_rate, optimizer and mixed_precision.
    """
    config = denoiser(pipe).config
    size = native_size(pipe)
    known = {"steps": "ss_steps", "seed": "ss_seed", "learning_rate": "ss_unet_lr"}
    known |= {"optimizer": "ss_optimizer", "mixed_precision": "ss_mixed_precision"}
    kind = {"v_prediction": "v", "epsilon": "epsilon"}.get(pipe.scheduler.config.get("prediction_type", ""))
    return {
        **_version_names(type(denoiser(pipe)).__name__, config, getattr(pipe, "text_encoder_2", None) is not None),
        "ss_sd_model_name": base_model,
        "ss_training_comment": comment,
        "ss_tag_frequency": json.dumps({"prompts": dict.fromkeys(prompts[:_TAGS], 1)}),
        **{key: str(options[name]) for name, key in known.items() if options.get(name) is not None},
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.description": comment,
        "modelspec.trigger_phrase": "",
        **({} if size is None else {"modelspec.resolution": f"{size[1]}x{size[0]}"}),
        **({} if kind is None else {"modelspec.prediction_type": kind}),
    }


def _version_names(class_name: str, config: Any, has_second_text: bool) -> dict[str, str]:
    """The base model's family, found by the width of its text conditioning or of its blocks.

    Empty if these keys have no name for the family.
    """
    if class_name not in ("FluxTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel"):
        return {}
    if class_name == "FluxTransformer2DModel":
        version, architecture = "flux1", "flux-1-dev" if config.guidance_embeds else "flux-1-schnell"
    elif class_name == "SD3Transformer2DModel":
        size = {(24, True): "5-medium", (24, False): "m", (38, False): "5-large"}
        name = size.get((config.num_layers, bool(config.get("dual_attention_layers"))))
        return {} if name is None else {"modelspec.architecture": f"stable-diffusion-3-{name}/lora"}
    elif has_second_text and config.cross_attention_dim == 2048:
        version, architecture = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    elif not has_second_text and config.cross_attention_dim == 768:
        version, architecture = "sd_v1", "stable-diffusion-v1"
    elif not has_second_text and config.cross_attention_dim == 1024:
        version, architecture = "sd_v2", "stable-diffusion-v2-512"
    else:
        return {}
    return {"ss_base_model_version": version, "modelspec.architecture": f"{architecture}/lora"}


def to_kohya(lora: Lora, pipe: Any = None) -> dict[str, torch.Tensor]:
    """The tensors of a file in kohya's naming. `pipe`: the pipeline of the adapters, as in `family_of`.

    Raises:
        ValueError: a module has no name in this naming, or its name would mean another module.
    """
    whole: Lora = {}
    modules = dict(lora)
    if any(module.startswith("transformer.") for module in modules):
        whole, modules = _original(modules, pipe)
    lost = [module for module in modules if not _reads_back(module)]
    if lost:
        raise ValueError(f"{listed(lost)} has no name in kohya's files: leave its adapters out")
    whole |= {_flat(module): factors for module, factors in modules.items()}
    tensors = {}
    for name, factors in whole.items():
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = factors.down, factors.up
        tensors[f"{name}.alpha"] = torch.tensor(float(factors.scale * factors.rank))
    return tensors


def _flat(module: str) -> str:
    part, _, name = module.partition(".")
    prefixes = {"unet": PREFIX, "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    is_t5 = name.startswith("encoder.block.")
    return ("lora_te3_" if is_t5 else prefixes.get(part, f"{part}_")) + name.replace(".", "_")


def _reads_back(module: str) -> bool:
    return any(published_names(family).modules(_flat(module)) == (module,) for family in families())


def _original(modules: Lora, pipe: Any) -> tuple[Lora, Lora]:
    """(a transformer's modules under the names of its original release, the remaining modules)."""
    whole: Lora = {}
    blocks, ends = LAYOUTS[family_of(modules, pipe)]
    for old, (theirs, leaves) in blocks.items():
        pattern = re.compile(rf"transformer\.{theirs}\.(\d+)\..*")
        for i in sorted({int(match[1]) for module in modules if (match := pattern.fullmatch(module))}):
            for leaf, parts in leaves.items():
                names = [f"transformer.{theirs}.{i}.{part}" for part in parts]
                held = [modules.pop(name, None) for name in names]
                if any(factors is not None for factors in held):
                    whole[f"{PREFIX}{old}_{i}_{leaf}"] = swapped(leaf, parts[0], _joined(parts, held))
    for old, theirs in ends.items():
        if (factors := modules.pop(f"transformer.{theirs}", None)) is not None:
            whole[PREFIX + old] = swapped(old, theirs, factors)
    return whole, modules


def _joined(parts: tuple[str, ...], held: list[Factors | None]) -> Factors:
    """The factors of the matrix that stacks the rows of its parts."""
    present = [factors for factors in held if factors is not None]
    if len(parts) == 1:
        return present[0]
    scales = {factors.scale for factors in present}
    scale = scales.pop() if len(scales) == 1 else 1.0
    ups, columns = [], sum(factors.rank for factors in present)
    at, width = 0, present[0].down.shape[1]
    for part, factors in zip(parts, held, strict=True):
        if factors is None:
            rows = (MLP_RATIO if part == "proj_mlp" else 1) * width
            ups.append(present[0].up.new_zeros(rows, columns))
            continue
        up = factors.up if factors.scale == scale else factors.scaled_up()
        ups.append(torch.nn.functional.pad(up, (at, columns - at - factors.rank)))
        at += factors.rank
    return Factors(torch.cat([factors.down for factors in present]), torch.cat(ups), scale)
