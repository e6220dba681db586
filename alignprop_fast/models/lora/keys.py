"""The keys of a LoRA file in any naming: each tensor's layer and factor.

unet.mid_block. ... .attn1.processor.to_q_lora.down.weight                  diffusers' `attn_procs`
text_encoder. ... .q_proj.lora_linear_layer.down.weight                     diffusers, for a text encoder
base_model.model.mid_block. ... .to_q.lora_A.default.weight                 PEFT
lora_unet_mid_block_ ... _to_q.lora_down.weight, .alpha                     kohya's scripts
diffusion_model.middle_block. ... .to_q.lora_A.weight                       ComfyUI
double_blocks.0.processor.qkv_lora1.down.weight                             XLabs
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_FACTOR = re.compile(
    r"(?P<layer>.+?)[._]lora(?P<number>\d?)(?:_linear_layer\.|[._])(?P<side>A|down|B|up)(?:(?:\.[^.]+)?\.weight)?"
)
_ALPHA = re.compile(r"(?P<layer>.+?)(?:[._]lora)?\.alpha")

_DELTAS = "whose deltas have another form: give plain LoRA files"
_OTHER_KINDS = {
    "dora_scale": f"a DoRA, {_DELTAS}",
    "magnitude_vector": f"a DoRA, {_DELTAS}",
    "hada_": f"a LoHa, {_DELTAS}",
    "lokr_": f"a LoKr, {_DELTAS}",
    "lora_mid": f"a LoCon with Tucker factors, {_DELTAS}",
    ".oft_": f"an OFT, {_DELTAS}",
    ".boft_": f"an OFT, {_DELTAS}",
    ".b1.weight": f"a GLoRA, {_DELTAS}",
    ".on_input": f"an IA3, {_DELTAS}",
    ".ia3_l": f"an IA3, {_DELTAS}",
    "vera_lambda": f"a VeRA, {_DELTAS}",
    "query_norm.scale": "a control LoRA, which needs a picture beside the prompt: give a plain LoRA file",
    "lora_controlnet": "a control LoRA, which needs a picture beside the prompt: give a plain LoRA file",
    "bundle_emb": "a LoRA with learned words, which cannot be kept here: save it without them",
    "emb_params": "a textual inversion (a learned word), which has no adapters: give a LoRA file",
    "string_to_param": "a textual inversion (a learned word), which has no adapters: give a LoRA file",
}
_WORDS = {"clip_l", "clip_g", "t5xxl"}  # the keys of a learned word, by text encoder
_NO_EFFECT = (".diff", ".diff_b", ".bias")  # added to weights, so they have no effect when they are zero


@dataclass
class Pair:
    """The tensors of one layer in a file, and the key of its first factor."""

    key: str
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    alpha: torch.Tensor | None = None


def check_kind(keys: Collection[str], file: Path) -> None:
    """Raises ValueError if the keys belong to something other than LoRA factors."""
    for word, kind in _OTHER_KINDS.items():
        if any(word in key for key in keys):
            raise ValueError(f"{file} is {kind}")
    if any(_FACTOR.fullmatch(key) for key in keys):
        return
    if set(keys) <= _WORDS or not any("." in key for key in keys):
        raise ValueError(f"{file} is {_OTHER_KINDS['emb_params']}")
    if any(key.endswith((".diff", ".diff_b")) for key in keys):
        raise ValueError(f"{file} holds whole differences of weights and no LoRA factor: give plain LoRA files")
    raise ValueError(
        f"{file} holds {min(keys)!r} and no LoRA factor in diffusers', kohya's, PEFT's or ComfyUI's naming: if it is a "
        "model, give the file of a LoRA"
    )


def pairs(tensors: Mapping[str, torch.Tensor], file: Path) -> dict[str, Pair]:
    """{the layer's name in the file: its factors}.

    Raises:
        ValueError: a factor appears twice or lacks its partner, or a tensor is not a factor.
    """
    found: dict[str, Pair] = {}
    alphas: dict[str, torch.Tensor] = {}
    strange = []
    for key, tensor in tensors.items():
        if match := _FACTOR.fullmatch(key):
            pair = found.setdefault(match["layer"] + match["number"], Pair(key))
            side = "down" if match["side"] in ("A", "down") else "up"
            if getattr(pair, side) is not None:
                raise ValueError(f"{file} has {pair.key!r} and {key!r} for one layer: give a file of one adapter")
            setattr(pair, side, tensor)
        elif match := _ALPHA.fullmatch(key):
            alphas[match["layer"]] = tensor
        elif not key.endswith(_NO_EFFECT) or tensor.any():
            strange.append(key)
    for layer, alpha in alphas.items():
        if layer in found:
            found[layer].alpha = alpha
        else:
            strange.append(f"{layer}.alpha")
    if strange:
        raise ValueError(
            f"{file} has {listed(strange)}, which names no LoRA factor in kohya's files or others: give plain "
            "LoRA files"
        )
    return found


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are, for a message of one line."""
    distinct = sorted(set(names))
    shown, more = distinct[:4], len(distinct[4:])
    return ", ".join(shown) + (f" and {more} more" if more else "")
