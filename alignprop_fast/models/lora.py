"""LoRA adapters (Hu et al. 2021) on a denoiser (UNet or transformer), over PEFT, in the file format of diffusers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.models.lora_file import (
    METADATA_KEY,
    WEIGHTS_NAME,
    lora_content,
    lora_file,
    lora_keys,
    read_lora,
    with_metadata,
)
from alignprop_fast.models.lora_keys import loads_as_it_is
from alignprop_fast.models.lora_targets import denoiser, denoiser_name, target_modules


def add_lora(pipe: Any, rank: int = 4, alpha: float = 4, targets: str = "attention") -> list[torch.nn.Parameter]:
    """Freeze the denoiser and give it trainable fp32 adapters; returns their parameters.

    y = W x + (alpha / rank) B A x on every layer that `targets` (of `lora_targets.TARGETS`) names, A drawn from
    N(0, 1 / rank^2) with the global generator and B zero, so that at first nothing changes.

    Raises:
        ValueError: a rank below 1, unknown targets, or a denoiser that already has adapters.
    """
    from peft import LoraConfig

    if rank < 1:
        raise ValueError(f"LoRA rank is {rank}: use at least 1")
    if has_lora(pipe):
        raise ValueError("the denoiser already has adapters: train those, or load the model without them")
    model = denoiser(pipe)
    names = target_modules(model, targets)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=names))
    return trainable_in_fp32(model)


def has_lora(pipe: Any) -> bool:
    """Whether the denoiser carries PEFT adapters."""
    return bool(getattr(denoiser(pipe), "peft_config", None))


def train_loaded_lora(pipe: Any) -> list[torch.nn.Parameter]:
    """Make adapters that `pipe.load_lora_weights` put in trainable, in fp32; returns their parameters."""
    model = denoiser(pipe)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            parameter.requires_grad_(True)
    return trainable_in_fp32(model)


def trainable_in_fp32(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Give the trainable parameters fp32 storage, whatever the frozen ones have, and return them."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.to(torch.float32)
    return trainable


def save_lora(pipe: Any, folder: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Write the denoiser's adapters to `folder/pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)`.

    The file is written whole: a temporary name, then a rename. `metadata` goes into its header, beside the adapter's
    own configuration, which carries rank and alpha.

    Raises:
        ValueError: a denoiser without adapters.
    """
    from safetensors.torch import save

    if not has_lora(pipe):
        raise ValueError("the denoiser has no adapters to save: call add_lora first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix, config = denoiser_name(pipe), next(iter(denoiser(pipe).peft_config.values()))
    tensors = {f"{prefix}.{key}": tensor.detach().contiguous().cpu() for key, tensor in _state(pipe).items()}
    header = {
        "format": "pt",
        **(metadata or {}),
        METADATA_KEY: _adapter_metadata(prefix, config),
    }
    temporary = folder / f".{WEIGHTS_NAME}.tmp"
    temporary.write_bytes(with_metadata(save(tensors), header))
    return temporary.replace(folder / WEIGHTS_NAME)


def _state(pipe: Any) -> dict[str, torch.Tensor]:
    """The adapters by their names in a file, without the prefix.

    A UNet's attention has diffusers' older names, which all its versions read; everything else has PEFT's. Of a file
    with both, diffusers' loader would leave the older names out.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    model = denoiser(pipe)
    state = get_peft_model_state_dict(model, adapter_name=next(iter(model.peft_config)))
    if denoiser_name(pipe) != "unet":
        return state
    older = convert_state_dict_to_diffusers(state)
    return older if all(".lora." in name for name in older) else state


def _adapter_metadata(prefix: str, config: Any) -> str:
    """What `load_lora_weights` needs to know beside the shapes, as diffusers stores it.

    Only fields that every version of PEFT has: a file with all of LoraConfig loads nowhere but in the same version.
    """
    fields = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    return json.dumps({f"{prefix}.{key}": value for key, value in fields.items()}, sort_keys=True)


def load_lora(pipe: Any, path: str | Path) -> None:
    """Put the adapters of a LoRA file, or of `path/pytorch_lora_weights.safetensors`, into the denoiser.

    Where it has adapters already, their values are overwritten in place, so that an optimizer keeps its hold on
    them; otherwise this is `pipe.load_lora_weights`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or adapters of another kind or shape, or in other places.
    """
    file = lora_file(path)
    if not has_lora(pipe):
        load_new(pipe, file)
    elif not loads_as_it_is(lora_keys(file)):
        raise ValueError(f"{file} is in kohya's naming, and the denoiser has adapters already: give {WEIGHTS_NAME}")
    else:
        _overwrite(pipe, file)


def load_new(pipe: Any, file: Path, name: str | None = None) -> None:
    """Give the pipeline the adapters of a LoRA file, whoever wrote it, under that name.

    Raises:
        ValueError: as `load_lora`.
    """
    lora = read_lora(file, pipe)
    try:
        if loads_as_it_is(lora_keys(file)):
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        else:  # diffusers itself reads some of these, and of some a part
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / WEIGHTS_NAME).write_bytes(lora_content(lora))
                pipe.load_lora_weights(folder, weight_name=WEIGHTS_NAME, adapter_name=name)
    except (ValueError, RuntimeError, KeyError) as error:
        raise _misfit(file) from error
    # diffusers passes over names that it does not know.
    if not all(_has(pipe, module, name) for module in lora):
        raise _misfit(file)


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


def _overwrite(pipe: Any, file: Path) -> None:
    from safetensors.torch import load_file

    state = {key.removeprefix(f"{denoiser_name(pipe)}."): tensor for key, tensor in load_file(file).items()}
    mine = _state(pipe)
    if {key: tensor.shape for key, tensor in mine.items()} != {key: tensor.shape for key, tensor in state.items()}:
        raise ValueError(f"the adapters in {file} have another rank or other places: use the LoRA rank they have")
    # PEFT's own loader puts new parameters in, which an optimizer would not know.
    with torch.no_grad():
        for key, tensor in mine.items():
            tensor.copy_(state[key])
