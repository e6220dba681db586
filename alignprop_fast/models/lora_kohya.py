"""The adapters once more under kohya's names, which ComfyUI, AUTOMATIC1111 and others read, and kohya's metadata.

    unet.mid_block.attentions.0 ... to_q.lora_A.weight  ->  lora_unet_mid_block_attentions_0 ... to_q.lora_down.weight

and an `.alpha` beside each pair, since these readers scale by alpha / rank. Blocks are called as in diffusers, for SDXL
too: all of these readers know both ways, and so does `load_lora_weights`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.models.lora import has_lora, with_metadata
from alignprop_fast.models.lora_targets import denoiser_name

KOHYA_NAME = "kohya_lora_weights.safetensors"
_TAGS = 100  # prompts that are listed in the metadata, at most


def has_kohya_names(pipe: Any) -> bool:
    """Whether these names are known for the pipeline's denoiser: UNets; transformers are called by other rules."""
    return denoiser_name(pipe) == "unet"


def save_kohya_lora(pipe: Any, folder: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write the UNet's adapters to `folder/kohya_lora_weights.safetensors`, whole, with `metadata` in the header.

    Raises:
        ValueError: a denoiser that is no UNet, or one without adapters.
    """
    from diffusers.utils import convert_state_dict_to_kohya
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save

    if not has_kohya_names(pipe):
        raise ValueError("kohya's names are known for UNets only: use pytorch_lora_weights.safetensors of save_lora")
    if not has_lora(pipe):
        raise ValueError("the UNet has no adapters to save: call add_lora first")
    name = next(iter(pipe.unet.peft_config))
    state = get_peft_model_state_dict(pipe.unet, adapter_name=name)
    tensors = convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in state.items()})
    # diffusers writes alpha = rank, whatever alpha the adapters have.
    tensors |= _alphas(pipe.unet, name)
    content = save({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{KOHYA_NAME}.tmp"
    temporary.write_bytes(with_metadata(content, {"format": "pt", **(metadata or {})}))
    return temporary.replace(folder / KOHYA_NAME)


def _alphas(unet: Any, name: str) -> dict[str, torch.Tensor]:
    from peft.tuners.lora import LoraLayer

    return {
        f"lora_unet_{path.replace('.', '_')}.alpha": torch.tensor(float(layer.scaling[name] * layer.r[name]))
        for path, layer in unet.named_modules()
        if isinstance(layer, LoraLayer)
    }


def kohya_metadata(
    pipe: Any, *, base_model: str, title: str, comment: str, prompts: Sequence[str], options: Mapping[str, Any]
) -> dict[str, str]:
    """What model managers show, in the keys of kohya's scripts (ss_*) and of Stability's model specification.

    base_model, title: names, not paths. comment: how it was trained, in a line. prompts: those that were trained on; as
    there are no trigger words, they stand in their place. options: of those called steps, seed, learning_rate,
    optimizer and mixed_precision, what there is.
    """
    adapters = next(iter(pipe.unet.peft_config.values()))
    config = pipe.unet.config
    is_xl = getattr(pipe, "text_encoder_2", None) is not None
    names = _version_names(is_xl, config.cross_attention_dim)
    size = config.sample_size * pipe.vae_scale_factor
    known = {"steps": "ss_steps", "seed": "ss_seed", "learning_rate": "ss_unet_lr"}
    known |= {"optimizer": "ss_optimizer", "mixed_precision": "ss_mixed_precision"}
    return {
        **names,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapters.r),
        "ss_network_alpha": str(float(adapters.lora_alpha)),
        "ss_sd_model_name": base_model,
        "ss_training_comment": comment,
        "ss_tag_frequency": json.dumps({"prompts": dict.fromkeys(prompts[:_TAGS], 1)}),
        **{key: str(options[name]) for name, key in known.items() if options.get(name) is not None},
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.description": comment,
        "modelspec.trigger_phrase": "",
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "v" if pipe.scheduler.config.prediction_type == "v_prediction" else "epsilon",
    }


def _version_names(is_xl: bool, text_width: int) -> dict[str, str]:
    """The base model's family, by the width of its text conditioning; nothing for one that is none of Stability's."""
    if is_xl and text_width == 2048:
        version, architecture = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    elif not is_xl and text_width == 768:
        version, architecture = "sd_v1", "stable-diffusion-v1"
    elif not is_xl and text_width == 1024:
        version, architecture = "sd_v2", "stable-diffusion-v2-512"
    else:
        return {}
    return {"ss_base_model_version": version, "modelspec.architecture": f"{architecture}/lora"}
