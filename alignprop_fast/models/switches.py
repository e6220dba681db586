"""Features of diffusers pipelines that the chain does not support: refused at set-up, with the call that undoes each.

The chain runs blocks again, decodes by bands and replaces layers by ops. A feature that changes how modules are called,
or what they remember between calls, would be bypassed or run twice. Features that are not in the list below work
exactly: attention processors and slicing, FreeU, textual inversion, tied or unfrozen weights. A test compares each with
autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny, ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

_ANEW = "load the pipeline again without it"
_QUANTIZERS = ("bitsandbytes", "torchao", "optimum", "quanto")
_WITH_PICTURES = ("text_image", "image", "image_hint", "image_proj", "text_image_proj", "ip_image_proj")
_METHODS = ("forward", "decode")
_TORCH_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NEWER_VAES = ("AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderDC")
_VAES: tuple[type, ...] = (
    *(AutoencoderKL, AutoencoderTiny, AsymmetricAutoencoderKL),
    *(getattr(diffusers, name) for name in _NEWER_VAES if hasattr(diffusers, name)),
)


@dataclass(frozen=True)
class Switch:
    """A feature that can be switched on in a pipeline.

    name: the user's word for it. seen: whether a module of the denoiser or the VAE has it on. undo: the call that
    switches it off; {part} stands for "unet", "transformer" or "vae", {path} for the module, such as "vae.decoder".
    """

    name: str
    seen: Callable[[Any], bool]
    undo: str


def _is_on(flag: str) -> Callable[[Any], bool]:
    # A module looks for an attribute that it lacks in three more places, and thousands of modules lack it.
    return lambda module: (flag in vars(module) or hasattr(type(module), flag)) and bool(getattr(module, flag))


def _option(module: Any, name: str) -> Any:
    """An entry of a network's configuration; None for a submodule."""
    return module.config.get(name) if isinstance(module, ModelMixin) else None


def _diffusers_hooks(module: Any) -> set[str]:
    """Names of the hooks in diffusers' own registry."""
    registry = vars(module).get("_diffusers_hook")
    return set() if registry is None else set(registry.hooks)


def _has_hook(word: str) -> Callable[[Any], bool]:
    return lambda module: any(word in name for name in _diffusers_hooks(module))


def _has_torch_hooks(module: nn.Module) -> bool:
    return any(vars(module).get(hooks) for hooks in _TORCH_HOOKS)


def _is_patched(module: nn.Module) -> bool:
    """Whether a method is not its class's; removing a patch can leave the class's own method on the module."""
    own = [(name, vars(module)[name]) for name in _METHODS if name in vars(module)]
    return any(
        getattr(method, "__self__", None) is not module
        or not any(vars(one).get(name) is getattr(method, "__func__", None) for one in type(module).__mro__)
        for name, method in own
    )


def _is_quantized(module: nn.Module) -> bool:
    """Whether another library quantised the weights; this package's own quantisation is allowed."""
    classes = [type(module), *map(type, module._parameters.values())]
    return (
        _is_on("is_quantized")(module)
        or any(one.__module__.split(".")[0] in _QUANTIZERS for one in classes)
        or any(one.__name__.startswith("GGUF") for one in classes)
    )


def _is_fused(attn: Any) -> bool:
    """Whether one product computes q, k and v; in UNets the attention's flag stays on after undoing it."""
    is_attention = "Attention" in type(attn).__name__ and hasattr(attn, "processor")
    by_processor = is_attention and type(attn.processor).__name__.startswith("Fused")
    return by_processor or (hasattr(attn, "unfuse_projections") and attn.fused_projections)


def _sees_pictures(module: nn.Module) -> bool:
    """Whether the module is an IP-Adapter, or a UNet that takes a picture beside the text."""
    if module._modules.get("image_proj") is not None:  # SD3's
        return True
    projection = module._modules.get("encoder_hid_proj")
    is_flux = projection is not None and _option(module, "encoder_hid_dim_type") is None
    kinds = (_option(module, "encoder_hid_dim_type"), _option(module, "addition_embed_type"))
    return is_flux or any(kind in _WITH_PICTURES for kind in kinds)


# The order matters: checks that know a feature by name come before checks for its traces.
SWITCHES = (
    Switch(
        "torch.compile",
        lambda module: type(module).__name__ == "OptimizedModule",
        "pipe.{path} = pipe.{path}._orig_mod; the sampler's compiled=True compiles the blocks itself",
    ),
    Switch(
        "compile()",
        lambda module: getattr(module, "_compiled_call_impl", None) is not None,
        f"{_ANEW}; the sampler's compiled=True compiles the blocks itself",
    ),
    Switch(
        "a parallel wrapper",
        lambda module: isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel),
        "pipe.{path} = pipe.{path}.module",
    ),
    Switch(
        "gradient checkpointing",
        _is_on("gradient_checkpointing"),
        "pipe.{part}.disable_gradient_checkpointing(); the sampler's plan decides what is computed again",
    ),
    Switch("tiling", _is_on("use_tiling"), "pipe.vae.disable_tiling(); the sampler decodes by bands if needed"),
    Switch("slicing", _is_on("use_slicing"), "pipe.vae.disable_slicing(); the sampler decodes by picture if needed"),
    Switch("a fused product of q, k and v", _is_fused, "pipe.{part}.unfuse_qkv_projections()"),
    Switch(
        "fused LoRA",
        lambda module: isinstance(module, BaseTunerLayer) and module.merged,
        "pipe.unfuse_lora(), or pipe.unload_lora_weights() to leave it in the weights",
    ),
    Switch(
        "accelerate's offload or device map",
        lambda module: "_hf_hook" in vars(module),
        "pipe.remove_all_hooks(), after a device_map pipe.reset_device_map(), then pipe.to(device); the sampler's "
        "memory_budget offloads",
    ),
    Switch(
        "layerwise casting",
        _has_hook("layerwise_casting"),
        f'{_ANEW}; the trainer\'s base_dtype="fp8" stores weights in 8 bits',
    ),
    Switch("group offload", _has_hook("group_offloading"), f"{_ANEW}; the sampler's memory_budget offloads"),
    Switch("a cache between steps", _is_on("is_cache_enabled"), "pipe.{part}.disable_cache()"),
    Switch("a hook of diffusers", lambda module: bool(_diffusers_hooks(module)), _ANEW),
    Switch("token merging", lambda module: "_tome_info" in vars(module), "tomesd.remove_patch(pipe)"),
    Switch(
        "a replaced method (a patch, or torch.compile of it)",
        _is_patched,
        f"remove it, or {_ANEW}",
    ),
    Switch("hooks", _has_torch_hooks, "call remove() on their handles; the sampler runs modules again, and in parts"),
    Switch(
        "quantised weights of another library",
        _is_quantized,
        'load it without; the trainer\'s base_dtype="nf4", "int8" or "fp8" quantises it',
    ),
    Switch(
        "a picture as a prompt (IP-Adapter)", _sees_pictures, "pipe.unload_ip_adapter(), or use a text-to-image model"
    ),
    Switch(
        "embedded guidance (LCM)",
        lambda module: _option(module, "time_cond_proj_dim") is not None,
        "use the model that it was distilled from",
    ),
    Switch(
        "class conditioning",
        lambda module: module._modules.get("class_embedding") is not None,
        "use a model that draws only from text",
    ),
)


def check_pipeline(pipe: Any, pipeline_class: type) -> None:
    """Check a pipeline before anything is done to it.

    Raises:
        ValueError: a part is missing, is not supported or is on another device, the pipeline does not draw like
            `pipeline_class`, or one of `SWITCHES` is on; the message says what undoes it.
    """
    for part in ("unet" if "unet" in pipe.components else "transformer", "vae", "scheduler"):
        if pipe.components[part] is None:
            raise ValueError(f"the pipeline has no {part}: load it with one")
    if type(pipe).__call__ is not pipeline_class.__call__:
        raise ValueError(
            f"{type(pipe).__name__} draws in its own way: use {pipeline_class.__name__}(**pipe.components)"
        )
    check_switches(pipe)
    if not isinstance(pipe.vae, _VAES):
        raise ValueError(
            f"pipe.vae is a {type(pipe.vae).__name__}, which is not supported: pipe.vae = AutoencoderKL.from_pretrained"
            "(...) or AutoencoderTiny"
        )
    devices = {part: module.device for part, path, module in _modules(pipe) if part == path}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"pipe.{part} on {device}" for part, device in devices.items())
        raise ValueError(f"the pipeline is on several devices ({where}): call pipe.to(device)")


def check_switches(pipe: Any) -> None:
    """Raises ValueError if one of `SWITCHES` is on; the message names it, its place, and what undoes it."""
    for part, path, module in _modules(pipe):
        for switch in SWITCHES:
            if switch.seen(module):
                undo = switch.undo.format(part=part, path=path)
                raise ValueError(f"pipe.{path} has {switch.name}, which the sampler does not support: {undo}")


def _modules(pipe: Any) -> Iterator[tuple[str, str, nn.Module]]:
    """(part, path, module) of every module in the denoiser and the VAE, which the chain runs in its own way."""
    for part in ("unet", "transformer", "vae"):
        root = pipe.components.get(part)
        if isinstance(root, nn.Module):
            for name, module in root.named_modules():
                yield part, f"{part}.{name}".rstrip("."), module
