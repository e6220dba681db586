"""The adapters of a pipeline: which ones exist, which one is trained and saved, and what it adds to the weights.

An adapter is a LoRA with one name. It has factors in the denoiser and, if its file had some for them, in text encoders.
It adds scale * up @ down to a weight, in memory as in a file. An adapter that does anything else does not fit a LoRA
file: setting up training and saving both refuse it, and the message names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from alignprop_fast.models.lora.factors import LEAVES_THE_BASE, Factors, Lora
from alignprop_fast.models.lora.keys import listed
from alignprop_fast.models.lora.targets import denoiser, denoiser_name, target_modules

# Fields that say where the factors are, how they started or how strong they are. A file does not need them, because it
# holds the factors and the scale of every module. Any other field that is set changes what the adapter computes.
_IN_THE_FACTORS = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config"),
        *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        "inference_mode",
    }
)


def has_lora(pipe: Any) -> bool:
    """Whether the denoiser carries PEFT adapters."""
    return bool(_configs(denoiser(pipe)))


def parts_with_adapters(pipe: Any) -> dict[str, nn.Module]:
    """The networks of the pipeline that carry adapters, by component name, without PEFT's wrapper."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: _unwrapped(part) for name, part in parts.items() if _configs(part)}


def the_adapter(pipe: Any, name: str | None = None) -> str:
    """Name of the adapter that is trained and saved: the given one, the one that requires grad, or the only one.

    Raises:
        ValueError: the denoiser has no adapters, none of that name, or several and no name was given.
    """
    names = list(_configs(denoiser(pipe)))
    if not names:
        raise ValueError("the denoiser has no adapters to save: call add_lora first")
    if name is not None:
        if name not in names:
            raise ValueError(f"the denoiser has no adapter {name!r}: choose one of {listed(map(repr, names))}")
        return name
    found = [name for name in names if requires_grad(pipe, name)] or names
    if len(found) > 1:
        whose = "require grad" if requires_grad(pipe, found[0]) else "exist and none requires grad"
        raise ValueError(
            f"the adapters {listed(map(repr, found))} {whose}: choose one, for example adapter={found[-1]!r}"
        )
    return found[0]


def requires_grad(pipe: Any, name: str) -> bool:
    """Whether any parameter of that adapter in the denoiser requires grad."""
    return any(learns(layer, name) for _, layer in _layers(denoiser(pipe), name))


def learns(layer: BaseTunerLayer, name: str) -> bool:
    """Whether any parameter of that adapter in one layer requires grad."""
    return any(p.requires_grad for path, p in layer.named_parameters() if name in path.split("."))


def adapter_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The LoRA factors of that adapter in one network."""
    for _, layer in _layers(model, name):
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            yield from (layer.lora_A[name].weight, layer.lora_B[name].weight)


def adapter_factors(pipe: Any, name: str) -> Lora:
    """The factors of an adapter in every part of the pipeline, by their names in LoRA files.

    They are the parameters themselves, detached, with the scale in effect: the result of alpha, rsLoRA, patterns and
    `set_adapters`.

    Raises:
        ValueError: as `check_fits_a_file`.
    """
    check_fits_a_file(pipe, name)
    return {
        f"{part}.{_name_in_files(part, model, path)}": Factors(
            layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), float(layer.scaling[name])
        )
        for part, model in parts_with_adapters(pipe).items()
        for path, layer in _layers(model, name)
    }


def check_fits_a_file(pipe: Any, name: str) -> None:
    """Refuse an adapter that diffusers could not restore exactly from a LoRA file.

    Raises:
        ValueError: another kind of adapter, an option of PEFT that needs more than factors, an initialisation that
            changes the base model, adapters in a part that diffusers does not load any into, or fused ones.
    """
    for part, model in parts_with_adapters(pipe).items():
        _check_not_fused(part, model)
        configs = _configs(model)
        for other, config in configs.items():
            if getattr(config, "init_lora_weights", True) not in LEAVES_THE_BASE:
                raise ValueError(
                    f"adapter {other!r} has init_lora_weights={config.init_lora_weights!r}, which changes the base "
                    'model, so its file would not fit the model as published: use init_lora_weights="gaussian"'
                )
        if name in configs:
            if part not in pipe._lora_loadable_modules:
                raise ValueError(f"adapter {name!r} is in {part}, where diffusers loads no adapters: delete it there")
            _check_config(name, configs[name])
            _check_layers(name, model)


def check_trains(pipe: Any, name: str) -> None:
    """Refuse an adapter that has no effect on the pictures, as a whole or in one of its parts.

    Raises:
        ValueError: adapters are switched off, this one is not active or has weight 0, or fused attention bypasses it.
    """
    for part, model in parts_with_adapters(pipe).items():
        layers = [layer for _, layer in _layers(model, name)]
        if any(layer.disable_adapters for layer in layers):
            raise ValueError(f"the adapters of {part} are switched off: call the pipeline's enable_lora() first")
        if not all(name in layer.active_adapters for layer in layers):
            raise ValueError(f"adapter {name!r} is not active: call the pipeline's set_adapters([{name!r}, ...]) first")
    model = _unwrapped(denoiser(pipe))
    if all(layer.scaling[name] == 0 for _, layer in _layers(model, name)):
        raise ValueError(f"adapter {name!r} has weight 0: give it another with the pipeline's set_adapters")
    if any(isinstance(m, Attention | AttentionModuleMixin) and m.fused_projections for m in model.modules()):
        raise ValueError("fused attention projections bypass the adapters: call unfuse_qkv_projections() first")


def describe(pipe: Any, name: str) -> str:
    """One line: where that adapter is, and which others exist."""
    where = {part: list(_configs(model)) for part, model in parts_with_adapters(pipe).items()}
    mine = [part for part, names in where.items() if name in names and part != denoiser_name(pipe)]
    others = sorted({other for names in where.values() for other in names if other != name})
    rank = _configs(denoiser(pipe))[name].r
    line = f"adapter {name!r} of the {denoiser_name(pipe)}, rank {rank}, is trained and saved"
    if mine:
        line += f"; its part in {', '.join(mine)} is not trained but saved with it"
    return line + (f"; neither trained nor saved: {listed(map(repr, others))}" if others else "")


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _configs(model: nn.Module) -> Mapping[str, PeftConfig]:
    return getattr(model, "peft_config", None) or {}


def _layers(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """The layers with parameters of that adapter, by path."""
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and _held(layer, name):
            yield path, layer


def _held(layer: BaseTunerLayer, name: str) -> set[str]:
    """The containers of parameters of a layer that have an entry for that adapter."""
    return {kind for kind in layer.adapter_layer_names if name in getattr(layer, kind, ())}


def _name_in_files(part: str, model: nn.Module, path: str) -> str:
    # Files use CLIP's names with `text_model`, which transformers 5 dropped; diffusers' loader expects them too.
    return f"text_model.{path}" if part.startswith("text_encoder") and not hasattr(model, "text_model") else path


def _check_not_fused(part: str, model: nn.Module) -> None:
    fused = {n for layer in model.modules() if isinstance(layer, BaseTunerLayer) for n in layer.merged_adapters}
    if fused:
        raise ValueError(
            f"adapters are fused into the weights of {part} ({listed(map(repr, fused))}): call unfuse_lora() first"
        )


def _check_config(name: str, config: PeftConfig) -> None:
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise ValueError(f"adapter {name!r} has PEFT's type {kind}, which LoRA files cannot hold: use peft.LoraConfig")
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in _IN_THE_FACTORS and value and value != field.default:
            raise ValueError(
                f"adapter {name!r} has {field.name} in its LoraConfig, which LoRA files cannot hold: make it without"
            )


def _check_layers(name: str, model: nn.Module) -> None:
    for path, layer in _layers(model, name):
        strange = _held(layer, name) - {"lora_A", "lora_B"}
        if strange or layer.lora_B[name].bias is not None:
            what = min(strange) if strange else "a bias"
            raise ValueError(
                f"adapter {name!r} has {what} in {path}, which LoRA files cannot hold: leave {path} out of its targets"
            )


DEFAULT = "default"  # PEFT's name for an adapter without a name


def add_lora(
    pipe: Any, rank: int = 4, alpha: float = 4, targets: str = "attention", name: str = DEFAULT
) -> list[torch.nn.Parameter]:
    """Freeze the denoiser and give it trainable fp32 adapters; returns their parameters.

    y = W x + (alpha / rank) B A x on every layer that `targets` (one of `targets.TARGETS`) names. A is drawn from
    N(0, 1 / rank^2) with the global generator. B starts as zero, so the output does not change at first.

    Raises:
        ValueError: the rank is below 1, the targets are unknown, or the denoiser already has adapters.
    """
    from peft import LoraConfig

    if rank < 1:
        raise ValueError(f"LoRA rank is {rank}: use at least 1")
    if has_lora(pipe):
        raise ValueError("the denoiser already has adapters: train those, or load the model without them")
    model = denoiser(pipe)
    names = target_modules(model, targets)
    model.requires_grad_(False)
    on_meta = model.device.type == "meta"
    # Without data nothing is drawn, and PyTorch takes ten times as long for a normal distribution as for PEFT's own.
    config = LoraConfig(
        r=rank, lora_alpha=alpha, init_lora_weights=True if on_meta else "gaussian", target_modules=names
    )
    # PEFT makes adapters of a model on the meta device on the CPU.
    with model.device if on_meta else nullcontext():
        model.add_adapter(config, name)
    return trainable_in_fp32(model)


def train_adapter(pipe: Any, name: str | None = None) -> str:
    """Make one adapter of the denoiser trainable, freeze everything else in it, and return the adapter's name.

    Its factors get fp32 storage, also those in text encoders, which stay frozen. Other adapters are not changed, and
    active ones stay active.

    Raises:
        ValueError: no adapter requires grad or was named, there are several to choose from, the adapter does not fit a
            LoRA file, or it has no effect on the denoiser's output.
    """
    chosen = the_adapter(pipe, name)
    if name is None and not requires_grad(pipe, chosen):
        raise ValueError(f"adapter {chosen!r} does not require grad: name it, adapter={chosen!r}, or add one to train")
    check_fits_a_file(pipe, chosen)
    check_trains(pipe, chosen)
    model = denoiser(pipe)
    for part in parts_with_adapters(pipe).values():
        part.requires_grad_(False)
        for parameter in adapter_parameters(part, chosen):
            parameter.data = parameter.data.to(torch.float32)
    for parameter in adapter_parameters(model, chosen):
        parameter.requires_grad_(True)
    return chosen


def trainable_in_fp32(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Give the trainable parameters fp32 storage and return them; frozen ones keep their dtype."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.to(torch.float32)
    return trainable
