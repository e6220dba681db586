"""LoRA files as diffusers, PEFT and trainers write them, for the tiny pipelines. Each writer returns its path."""

import re

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from alignprop_fast.models.lora.factors import Factors
from alignprop_fast.models.lora.file import DOWN, UP
from alignprop_fast.models.lora.targets import denoiser
from alignprop_fast.models.published import layers

from ...adapters import draw_factors, factors_of
from ...loadable import Format
from .lora_files import BLOCK

UNET = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"]
WIDE = [f"{BLOCK}.ff.net.0.proj", "down_blocks.0.resnets.0.conv1", "up_blocks.1.resnets.0.conv_shortcut"]
TEXT = [f"text_model.encoder.layers.1.{leaf}" for leaf in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")]
FLUX = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_add_out",
    "single_transformer_blocks.1.proj_out",
]
Z_IMAGE = ["layers.0.attention.to_q", "noise_refiner.0.attention.to_out.0", "context_refiner.0.feed_forward.w2"]
SHARED = ["transformer_blocks.0.attn.add_q_proj", "single_transformer_blocks.0.attn.to_q"]


def factors(pipe, paths, rank=2):
    """{part.path: Factors}, alpha 3, ranks of two sizes, for layers of the denoiser or of the text encoder."""
    generator, made = torch.Generator().manual_seed(0), {}
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    shapes = {name: layers(denoiser(pipe)), "text_encoder": layers(pipe.text_encoder)}
    for i, path in enumerate(paths):
        part = "text_encoder" if path.startswith("text_model.") else name
        shape = shapes[part].get(path) or shapes[part][path.removeprefix("text_model.")]
        r = rank + i % 2
        down = torch.randn(r, *shape[1:], generator=generator)
        up = torch.randn(shape[0], r, *(1 for _ in shape[2:]), generator=generator)
        made[f"{part}.{path}"] = Factors(down, up, 3 / r)
    return made


def written(lora, path, name, down=DOWN, up=UP, alpha=".alpha"):
    """A file in which each module has the name that `name` makes of it; alpha None: in the factors."""
    tensors = {}
    for module, one in lora.items():
        tensors[name(module) + down] = one.down
        tensors[name(module) + up] = one.up if alpha else one.scaled_up()
        if alpha:
            tensors[name(module) + alpha] = torch.tensor(3.0)
    save_file(tensors, path)
    return path


def flat(module):
    part, _, path = module.partition(".")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_", "transformer": "lora_transformer_"}[part]
    return prefix + path.replace(".", "_")


def processor(module):
    module = re.sub(r"(attn\d?)\.(to_\w)", r"\1.processor.\2", module.removesuffix(".0"))
    return re.sub(r"\.(\w)_proj$", r".to_\1", module).replace("out_proj", "to_out") + "_lora"


def attention_processors(pipe, path):
    return written(factors(pipe, UNET), path, processor, ".down.weight", ".up.weight", alpha=None)


def linear_layers(pipe, path):
    return written(
        factors(pipe, TEXT), path, lambda m: m + ".lora_linear_layer", ".down.weight", ".up.weight", alpha=None
    )


def older_diffusers(pipe, path):
    return written(factors(pipe, UNET), path, str, ".lora.down.weight", ".lora.up.weight", alpha=None)


def diffusers_names(pipe, path):
    return written(factors(pipe, UNET + WIDE + TEXT), path, str, alpha=None)


def saved_by_diffusers(pipe, path):
    """As in diffusers' training scripts: factors of UNet and text encoder, and their settings in the header."""
    parts = {}
    for part, targets in ((pipe.unet, ["to_q", "to_out.0", "conv1"]), (pipe.text_encoder, ["q_proj", "fc1"])):
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=True, alpha_pattern={targets[0]: 5})
        part.add_adapter(config)
        draw_factors(factors_of(part), std=1.0)
        parts[part] = get_peft_model_state_dict(part), config.to_dict()
    (unet, unet_config), (text, text_config) = parts.values()
    configs = {"unet_lora_adapter_metadata": unet_config, "text_encoder_lora_adapter_metadata": text_config}
    type(pipe).save_lora_weights(path.parent, unet, text, weight_name=path.name, **configs)
    return path


def kohya(pipe, path):
    return written(factors(pipe, UNET + WIDE + TEXT), path, flat, ".lora_down.weight", ".lora_up.weight")


def lora_transformer(pipe, path):
    return written(factors(pipe, FLUX[:2]), path, flat, ".lora_down.weight", ".lora_up.weight")


def transformer_with_alpha(pipe, path):
    lora = factors(pipe, FLUX[:2])
    return written({**lora}, path, str)


def ai_toolkit(pipe, path):
    return written(
        factors(pipe, Z_IMAGE), path, lambda name: name.replace("transformer.", "diffusion_model."), alpha=None
    )


def ai_toolkit_flux2(pipe, path):
    """The names of the original release, its joined matrices included."""
    generator = torch.Generator().manual_seed(0)
    rows = {"double_blocks.0.img_attn.qkv": 96, "single_blocks.1.linear1": 288, "double_blocks.0.txt_mlp.0": 192}
    tensors = {}
    for name, count in rows.items():
        tensors[f"diffusion_model.{name}{DOWN}"] = torch.randn(2, 32, generator=generator)
        tensors[f"diffusion_model.{name}{UP}"] = torch.randn(count, 2, generator=generator)
    save_file(tensors, path)
    return path


def xlabs(pipe, path):
    whole = factors(pipe, [*FLUX, *SHARED])
    names = {
        "transformer_blocks.0.attn.to_q": ("double_blocks.0.processor.qkv_lora1", 3),
        "transformer_blocks.0.attn.to_add_out": ("double_blocks.0.processor.proj_lora2", 1),
        "transformer_blocks.0.attn.add_q_proj": ("double_blocks.0.processor.qkv_lora2", 3),
        "single_transformer_blocks.1.proj_out": ("single_blocks.1.processor.proj_lora", 1),
        "single_transformer_blocks.0.attn.to_q": ("single_blocks.0.processor.qkv_lora", 3),
    }
    tensors = {}
    for module, one in whole.items():
        name, times = names[module.removeprefix("transformer.")]
        tensors[f"{name}.down.weight"] = one.down
        tensors[f"{name}.up.weight"] = torch.cat([one.up * (i + 1) for i in range(times)])
    save_file(tensors, path)
    return path


READ_BY_DIFFUSERS = {
    Format("diffusers, UNet and text encoder, settings in the header", "read exactly"): ("sd", saved_by_diffusers),
    Format("diffusers, PEFT's names without settings", "read exactly"): ("sd", diffusers_names),
    Format("diffusers, older names of attention (`.lora.down.weight`)", "read exactly"): ("sd", older_diffusers),
    Format("diffusers, `attn_procs` (`.processor.to_q_lora.down.weight`)", "read exactly"): (
        "sd",
        attention_processors,
    ),
    Format("diffusers, text encoder with `lora_linear_layer`", "read exactly"): ("sd", linear_layers),
    Format("kohya's scripts, UNet in diffusers' names and text encoder", "read exactly"): ("sd", kohya),
    Format("FLUX, `lora_transformer_` (OneTrainer)", "read exactly"): ("flux", lora_transformer),
    Format("FLUX, diffusers' names with `.alpha`", "read exactly"): ("flux", transformer_with_alpha),
    Format("FLUX, XLabs' names", "read exactly"): ("flux", xlabs),
    Format("Z-Image, ai-toolkit's names (`diffusion_model.`)", "read exactly"): ("z_image", ai_toolkit),
    Format("FLUX.2, ai-toolkit's names (`diffusion_model.`)", "read exactly"): ("flux2_klein", ai_toolkit_flux2),
}


def peft_unet(pipe, folder):
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["to_q", "to_out.0", "conv1"]},
        **{"alpha_pattern": {"mid_block.*to_q": 5}, "rank_pattern": {"attn2.to_q": 3}},
    )
    return save_peft(pipe.unet, config, folder)


def peft_text(pipe, folder):
    return save_peft(pipe.text_encoder, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "fc1"]), folder)


def peft_transformer(pipe, folder):
    return save_peft(pipe.transformer, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "proj_mlp"]), folder)


def save_peft(model, config, folder):
    model = get_peft_model(model, config)
    draw_factors(factors_of(model), std=1.0)
    model.save_pretrained(folder)
    return folder


READ_BY_PEFT = {
    Format("PEFT, folder of a UNet's adapters (`adapter_model.safetensors`)", "read exactly"): ("sd", peft_unet),
    Format("PEFT, folder of a text encoder's adapters", "read exactly"): ("sd", peft_text),
    Format("PEFT, folder of a FLUX transformer's adapters", "read exactly"): ("flux", peft_transformer),
}
