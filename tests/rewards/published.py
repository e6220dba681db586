"""Published networks in plain torch, built from the weight names in their files, and random weights under those names.

The rewards are compared with them, because the original libraries are not installed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def _random(shapes: dict[str, Sequence[int]], seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in state.items():
        if tensor.ndim > 1:
            tensor.mul_(0.7 / tensor[0].numel() ** 0.5 if "embedding" not in name else 0.3)
        elif name.endswith("weight"):  # of a norm
            tensor.mul_(0.1).add_(1)
        else:
            tensor.mul_(0.1)
    return state


def write_preprocessor(folder: Path, **changes: object) -> None:
    """`preprocessor_config.json` as OpenAI published it, with `changes`."""
    published = {
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 224,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(published | changes))


def open_clip_state(vocabulary: int, image: int = 28, layers: int = 2, embedding: int = 32) -> State:
    """An open_clip `CLIP`: vision 160 wide with heads of 80, text 128 wide with heads of 64, patches of 14."""
    shapes: dict[str, Sequence[int]] = {
        "positional_embedding": (77, 128),
        "text_projection": (128, embedding),
        "visual.class_embedding": (160,),
        "visual.positional_embedding": ((image // 14) ** 2 + 1, 160),
        "visual.proj": (160, embedding),
        "visual.conv1.weight": (160, 3, 14, 14),
        "token_embedding.weight": (vocabulary, 128),
    }
    for norm, width in (("visual.ln_pre", 160), ("visual.ln_post", 160), ("ln_final", 128)):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for tower, width in (("visual.", 160), ("", 128)):
        for layer in range(layers):
            block = f"{tower}transformer.resblocks.{layer}"
            shapes |= {f"{block}.{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= {f"{block}.attn.out_proj.weight": (width, width), f"{block}.attn.out_proj.bias": (width,)}
            shapes |= {f"{block}.mlp.c_fc.weight": (2 * width, width), f"{block}.mlp.c_fc.bias": (2 * width,)}
            shapes |= {f"{block}.mlp.c_proj.weight": (width, 2 * width), f"{block}.mlp.c_proj.bias": (width,)}
    return _random(shapes, seed=0) | {"logit_scale": torch.tensor(4.6052)}


def open_clip_cosine(state: State, pixels_BCHW: Tensor, ids_BL: Tensor) -> Tensor:
    """Cosine similarities, [B], of an open_clip `CLIP`. ids_BL: start, words, end (the largest number), anything."""
    x_BNC = F.conv2d(pixels_BCHW, state["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    first_B1C = state["visual.class_embedding"].expand(len(x_BNC), 1, -1)
    x_BNC = torch.cat((first_B1C, x_BNC), 1) + state["visual.positional_embedding"]
    x_BNC = _norm(state, "visual.ln_pre", x_BNC)
    x_BNC = _open_clip_blocks(state, "visual.", x_BNC, heads=x_BNC.shape[-1] // 80, mask_LL=None)
    image_BE = _norm(state, "visual.ln_post", x_BNC[:, 0]) @ state["visual.proj"]
    length = ids_BL.shape[1]
    x_BLC = state["token_embedding.weight"][ids_BL] + state["positional_embedding"][:length]
    causal_LL = torch.full((length, length), float("-inf"), dtype=x_BLC.dtype).triu(1)
    x_BLC = _open_clip_blocks(state, "", x_BLC, heads=x_BLC.shape[-1] // 64, mask_LL=causal_LL)
    x_BLC = _norm(state, "ln_final", x_BLC)
    text_BE = x_BLC[torch.arange(len(ids_BL)), ids_BL.argmax(1)] @ state["text_projection"]
    return F.cosine_similarity(image_BE, text_BE)


def _open_clip_blocks(state: State, tower: str, x_BNC: Tensor, heads: int, mask_LL: Tensor | None) -> Tensor:
    layer = 0
    while (block := f"{tower}transformer.resblocks.{layer}") + ".ln_1.weight" in state:
        y_BNC = _norm(state, f"{block}.ln_1", x_BNC)
        qkv_BN3C = F.linear(y_BNC, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"])
        y_BNC = _attention(*qkv_BN3C.chunk(3, -1), heads, mask_LL)
        x_BNC = x_BNC + _linear(state, f"{block}.attn.out_proj", y_BNC)
        y_BNC = F.gelu(_linear(state, f"{block}.mlp.c_fc", _norm(state, f"{block}.ln_2", x_BNC)))
        x_BNC = x_BNC + _linear(state, f"{block}.mlp.c_proj", y_BNC)
        layer += 1
    return x_BNC


def imagereward_state(vocabulary: int, image: int = 32, layers: int = 2) -> State:
    """ImageReward's names with a vision tower 128 wide and a text tower 64 wide, patches of 16."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    shapes: dict[str, Sequence[int]] = {
        f"{vision}.cls_token": (1, 1, 128),
        f"{vision}.pos_embed": (1, (image // 16) ** 2 + 1, 128),
        f"{vision}.patch_embed.proj.weight": (128, 3, 16, 16),
        f"{vision}.patch_embed.proj.bias": (128,),
        f"{text}.embeddings.word_embeddings.weight": (vocabulary, 64),
        f"{text}.embeddings.position_embeddings.weight": (512, 64),
        **_pair(f"{text}.embeddings.LayerNorm", 64),
        **_pair(f"{vision}.norm", 128),
        **_pair("blip.vision_proj", 256, 128),
        **_pair("blip.text_proj", 256, 64),
    }
    for layer in range(layers):
        block = f"{vision}.blocks.{layer}"
        shapes |= _pair(f"{block}.norm1", 128) | _pair(f"{block}.norm2", 128)
        shapes |= _pair(f"{block}.attn.qkv", 384, 128) | _pair(f"{block}.attn.proj", 128, 128)
        shapes |= _pair(f"{block}.mlp.fc1", 512, 128) | _pair(f"{block}.mlp.fc2", 128, 512)
        block = f"{text}.encoder.layer.{layer}"
        for part, width in (("attention", 64), ("crossattention", 128)):
            shapes |= _pair(f"{block}.{part}.self.query", 64, 64)
            shapes |= _pair(f"{block}.{part}.self.key", 64, width) | _pair(f"{block}.{part}.self.value", 64, width)
            shapes |= _pair(f"{block}.{part}.output.dense", 64, 64) | _pair(f"{block}.{part}.output.LayerNorm", 64)
        shapes |= _pair(f"{block}.intermediate.dense", 128, 64) | _pair(f"{block}.output.dense", 64, 128)
        shapes |= _pair(f"{block}.output.LayerNorm", 64)
    state = _random(shapes, seed=1) | head_state(64)
    return state | {f"{text}.embeddings.position_ids": torch.arange(512)[None]}


def imagereward_score(state: State, pixels_BCHW: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """ImageReward's scores, [B], from its own names."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    kernel = (state[f"{vision}.patch_embed.proj.weight"], state[f"{vision}.patch_embed.proj.bias"])
    x_BNC = F.conv2d(pixels_BCHW, *kernel, stride=16).flatten(2).transpose(1, 2)
    first_B1C = state[f"{vision}.cls_token"].expand(len(x_BNC), 1, -1)
    x_BNC = torch.cat((first_B1C, x_BNC), 1) + state[f"{vision}.pos_embed"]
    for layer in range(_depth(state, f"{vision}.blocks.")):
        block = f"{vision}.blocks.{layer}"
        qkv_BN3C = _linear(state, f"{block}.attn.qkv", _norm(state, f"{block}.norm1", x_BNC, 1e-6))
        x_BNC = x_BNC + _linear(state, f"{block}.attn.proj", _attention(*qkv_BN3C.chunk(3, -1), heads=2))
        y_BNC = F.gelu(_linear(state, f"{block}.mlp.fc1", _norm(state, f"{block}.norm2", x_BNC, 1e-6)))
        x_BNC = x_BNC + _linear(state, f"{block}.mlp.fc2", y_BNC)
    image_BNC = _norm(state, f"{vision}.norm", x_BNC, 1e-6)
    words, places = (state[f"{text}.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
    x_BLC = _norm(state, f"{text}.embeddings.LayerNorm", words[ids_BL] + places[: ids_BL.shape[1]], 1e-12)
    hidden_B11L = torch.where(mask_BL.bool(), 0.0, float("-inf"))[:, None, None].to(x_BLC.dtype)
    for layer in range(_depth(state, f"{text}.encoder.layer.")):
        block = f"{text}.encoder.layer.{layer}"
        for part, source_BNC, mask in (("attention", None, hidden_B11L), ("crossattention", image_BNC, None)):
            source_BNC = x_BLC if source_BNC is None else source_BNC
            query_BLC = _linear(state, f"{block}.{part}.self.query", x_BLC)
            key_BNC, value_BNC = (
                _linear(state, f"{block}.{part}.self.{kind}", source_BNC) for kind in ("key", "value")
            )
            y_BLC = _linear(state, f"{block}.{part}.output.dense", _attention(query_BLC, key_BNC, value_BNC, 1, mask))
            x_BLC = _norm(state, f"{block}.{part}.output.LayerNorm", y_BLC + x_BLC, 1e-12)
        y_BLC = F.gelu(_linear(state, f"{block}.intermediate.dense", x_BLC))
        y_BLC = _linear(state, f"{block}.output.dense", y_BLC)
        x_BLC = _norm(state, f"{block}.output.LayerNorm", y_BLC + x_BLC, 1e-12)
    return (head_score(state, x_BLC[:, 0], "mlp.") - 0.16717362830052426) / 1.0333394966054072


def head_state(width: int, prefix: str = "mlp.") -> State:
    """The five linear layers of ImageReward and of the aesthetic predictor v2."""
    sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    shapes: dict[str, Any] = {}
    for number, (outputs, inputs) in sizes.items():
        shapes |= _pair(f"{prefix}layers.{number}", outputs, inputs)
    return _random(shapes, seed=2)


def head_score(state: State, x_BC: Tensor, prefix: str = "") -> Tensor:
    for number in (0, 2, 4, 6, 7):
        x_BC = _linear(state, f"{prefix}layers.{number}", x_BC)
    return x_BC.squeeze(-1)


def _pair(name: str, outputs: int, inputs: int | None = None) -> dict[str, Sequence[int]]:
    return {f"{name}.weight": (outputs,) if inputs is None else (outputs, inputs), f"{name}.bias": (outputs,)}


def _depth(state: State, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: State, name: str, x: Tensor, epsilon: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], epsilon)


def _attention(q_BNC: Tensor, k_BMC: Tensor, v_BMC: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_BNC, k_BMC, v_BMC))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
