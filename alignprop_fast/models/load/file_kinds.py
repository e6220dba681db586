"""Recognise files that are not a trainable model, by their first bytes and by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Shapes = Mapping[str, list[int]]

_AGAIN = "copy or download it again"
# First bytes, kind of file, remedy. A safetensors file begins with the length of its header, then "{".
_FIRST_BYTES: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF, whose quantised weights cannot be trained on", "give the model in fp16 or bf16 (.safetensors)"),
    (b"PK\x03\x04", "a pickle or another archive, which could run code when it is loaded", "give a .safetensors file"),
    (b"\x80", "a pickle, which could run code when it is loaded", "give a .safetensors file"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer instead of the file",
        "fetch the file with git lfs pull, or download it",
    ),
    (b"<", "a web page", "download the file itself; gated models need hf auth login first"),
    (b"[ZoneTransfer]", "Windows' note about a download", "give the file beside it"),
    (b"\x08", "an ONNX model, which cannot be trained", "give the model in the diffusers format"),
)
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_LORA = re.compile(
    r"lora_(unet|te\d?|transformer)_|\.lora[._]|lora_(A|B|up|down)\b|\.(hada|lokr|oft|boft|dora)_|^lycoris_"
)
_VAE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "loss.", "model_ema.")


def check_bytes(file: Path) -> None:
    """Raises ValueError if the first bytes of a file belong to another kind than safetensors."""
    with file.open("rb") as stream:
        first = stream.read(64)
    if not first:
        raise ValueError(f"{file} is empty (0 bytes), damaged: {_AGAIN}")
    if len(first) <= 8 or first[8:9] == b"{":  # a file this short is damaged, which opening it reports
        return
    for begin, what, remedy in _FIRST_BYTES:
        if first.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(begin):
            raise ValueError(f"{file} is {what}: {remedy}")
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in first):
        raise ValueError(f"{file} is text, not a .safetensors file: give one, or the folder that it is in")


@dataclass(frozen=True)
class Kind:
    """A kind of file that is not a trainable model. seen: recognises it by the names and shapes of its tensors."""

    name: str
    seen: Callable[[Shapes], bool]
    remedy: str


def _any(*marks: str) -> Callable[[Shapes], bool]:
    """Whether a name contains one of these, or begins with one marked ^."""
    found = re.compile("|".join(("^" if mark[0] == "^" else "") + re.escape(mark.lstrip("^")) for mark in marks))
    return lambda shapes: any(found.search(name) for name in shapes)


def _is_embedding(shapes: Shapes) -> bool:
    names = {"emb_params", "clip_l", "clip_g", "string_to_param", "learned_embeds"}
    few = len(shapes) <= 2 and all(len(shape) <= 2 for shape in shapes.values())
    return few or bool(names & shapes.keys())


def _is_vae(shapes: Shapes) -> bool:
    inner = {name.removeprefix("first_stage_model.").removeprefix("vae.") for name in shapes}
    return all(name.startswith(_VAE) for name in inner)


# The order matters: a LoRA of a text encoder has the text encoder's names, and T5's first names are a VAE's.
KINDS = (
    Kind(
        "bitsandbytes' 4-bit weights",
        _any(".quant_state.bitsandbytes", ".quant_map"),
        "give the file in fp16 or bf16 (--base-dtype nf4 stores them so)",
    ),
    Kind(
        "fp8 weights with scales, which diffusers does not apply",
        lambda shapes: any(name.endswith(("scaled_fp8", ".scale_weight", ".weight_scale")) for name in shapes),
        "give the file in fp16 or bf16 (--base-dtype fp8 stores them in fp8)",
    ),
    Kind(
        "a LoRA, not a model",
        lambda shapes: any(_LORA.search(name) for name in shapes),
        "give the model that it was trained on; sample takes the LoRA with --lora, merge takes it directly",
    ),
    Kind("an IP-Adapter, not a model", _any("^ip_adapter.", "^image_proj."), "give the text-to-image model itself"),
    Kind(
        "a ControlNet or T2I-Adapter, not a model",
        _any(
            "^control_model.", "controlnet_", "input_hint_block.", "^zero_convs.", "^adapter.body.", "^body.0.resnets."
        ),
        "give the text-to-image model itself",
    ),
    Kind("an embedding (textual inversion), not a model", _is_embedding, "give the text-to-image model itself"),
    Kind(
        "an upscaler", _any("^conv_first.", "^model.1.sub.", "^params_ema.", "^params."), "give a text-to-image model"
    ),
    Kind(
        "SDXL's refiner, which needs a picture beside the prompt",
        _any("^conditioner.embedders.0.model."),
        "give SDXL itself or a fine-tune",
    ),
    Kind("Playground v2.5, whose EDM noise is not supported", _any("^edm_mean"), "give SDXL or a fine-tune of it"),
)
_ALONE = (
    Kind(
        "a text encoder alone",
        _any(
            *("text_model.", "transformer.resblocks.", "^encoder.block.", "^shared.weight", "^cond_stage_model."),
            *("^conditioner.", "^model.layers.", "^enc.blk.", "^text_encoders.", "^blk."),
        ),
        "give the model with its denoiser",
    ),
    Kind("an image encoder (CLIP)", _any("vision_model.", "^visual."), "give a text-to-image model"),
    Kind("a VAE, not a model", _is_vae, "give the model with its denoiser"),
)
_FLUX2, _TOLD_GUIDANCE = _any("double_stream_modulation_img."), _any("guidance_in.", "guidance_embedder.")
_DENOISERS = {
    "Krea2Pipeline": _any("text_fusion.projector."),
    "ChromaPipeline": _any("distilled_guidance_layer."),
    "Lumina2Pipeline": _any("time_caption_embed."),
    "SanaPipeline": _any("caption_norm.weight"),
    "QwenImagePipeline": _any("transformer_blocks.0.img_mod.1."),
    "Flux2Pipeline": lambda shapes: _FLUX2(shapes) and _TOLD_GUIDANCE(shapes),
    "Flux2KleinPipeline": _FLUX2,
    "StableDiffusion3Pipeline": _any("joint_blocks.0.", "attn.add_k_proj.weight"),
    "FluxPipeline": _any("double_blocks.0.", "^single_transformer_blocks.0."),
    "ZImagePipeline": _any("layers.0.adaLN_modulation.0.weight"),
    "StableDiffusionPipeline": _any("input_blocks.0.0.weight", "^down_blocks.0."),
}


def check_kind(file: Path, shapes: Shapes) -> str:
    """The class of pipeline whose denoiser a file holds; StableDiffusionPipeline for every UNet.

    Raises:
        ValueError: the file is of another kind.
    """
    for kind in KINDS:
        if kind.seen(shapes):
            raise ValueError(f"{file} holds {kind.name}: {kind.remedy}")
    found = [name for name, seen in _DENOISERS.items() if seen(shapes)]
    if found:
        # In diffusers' names FLUX.1 has everything that SD3 has, and single blocks; FLUX.2 also shared modulation.
        # Qwen-Image has SD3's attention, and Chroma has FLUX.1's blocks.
        first = ("QwenImagePipeline", "ChromaPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "FluxPipeline")
        return next(one for one in (*first, *found) if one in found)
    for kind in _ALONE:
        if kind.seen(shapes):
            raise ValueError(f"{file} holds {kind.name}: {kind.remedy}")
    names = ", ".join(sorted(shapes)[:3])
    raise ValueError(
        f"{file} holds no known denoiser (but {names}): give an SD, SDXL, SD3, FLUX, Chroma, FLUX.2, Z-Image, "
        "Krea 2, Lumina 2, SANA or Qwen-Image model"
    )


def has_text_encoders(shapes: Shapes) -> bool:
    return any(name.startswith(("cond_stage_model.", "conditioner.")) for name in shapes)


def denoiser_names(shapes: Shapes) -> dict[str, str]:
    """The denoiser's tensors: name in the file -> name without the prefix that some programs add."""
    prefix = next((one for one in _PREFIXES if any(name.startswith(one) for name in shapes)), "")
    return {name: name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
