"""The names that kohya's scripts, ComfyUI, Forge and others give LoRA factors, and the original releases' layers.

    unet.mid_block.attentions.0 ... to_q               ->  lora_unet_mid_block_attentions_0 ... to_q
    transformer.transformer_blocks.3.attn.to_out.0     ->  lora_unet_double_blocks_3_img_attn_proj     (FLUX)
    transformer.transformer_blocks.3.attn.{to_q,to_k,to_v}  ->  lora_unet_joint_blocks_3_x_block_attn_qkv   (SD3)
    transformer.layers.3.attention.{to_q,to_k,to_v}    ->  lora_unet_layers_3_attention_qkv            (Z-Image)

with the suffixes .lora_down.weight, .lora_up.weight and .alpha (scale = alpha / rank). UNets keep diffusers' block
names, which all readers know. SGM's names, which kohya's scripts write for SDXL, are read too. The transformers have
the names of their original releases, which join several projections into one matrix. With factors (A_i, B_i) of the
parts,

    down = [A_1; A_2; ...]     up = diag(B_1, B_2, ...)

gives the same delta; a part without factors is zero. In the other direction, each part takes its rows of `up`, and of
these the columns that are not all zero. From a block-diagonal file this returns the original factors; from any other
file every part gets all of `down`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from alignprop_fast.models.lora.factors import Factors, Lora

PREFIX = "lora_unet_"
_Blocks = Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]

_FLUX_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_MMDIT = {
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn_proj": ("attn.to_out.0",),
    "context_block_attn_proj": ("attn.to_add_out",),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",),
}
_Z_IMAGE = {
    "attention_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention_out": ("attention.to_out.0",),
    **{f"feed_forward_w{number}": (f"feed_forward.w{number}",) for number in (1, 2, 3)},
    "adaLN_modulation_0": ("adaLN_modulation.0",),
}
_EMBEDDERS = {"time": "timestep", "vector": "text", "guidance": "guidance"}
_FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{f"{old}_in_in_layer": f"time_text_embed.{new}_embedder.linear_1" for old, new in _EMBEDDERS.items()},
    **{f"{old}_in_out_layer": f"time_text_embed.{new}_embedder.linear_2" for old, new in _EMBEDDERS.items()},
}
_MMDIT_ENDS = {
    "x_embedder_proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
}
_LAST = {"final_layer_linear": "proj_out", "final_layer_adaLN_modulation_1": "norm_out.linear"}
_FLUX_BLOCKS = {
    "double_blocks": ("transformer_blocks", _FLUX_DOUBLE),
    "single_blocks": ("single_transformer_blocks", _FLUX_SINGLE),
}
_CHROMA_BLOCKS = {  # beside FLUX.1's
    "distilled_guidance_layer_layers": (
        "distilled_guidance_layer.layers",
        {"in_layer": ("linear_1",), "out_layer": ("linear_2",)},
    )
}
_CHROMA_ENDS = {f"distilled_guidance_layer_{end}": f"distilled_guidance_layer.{end}" for end in ("in_proj", "out_proj")}
_MMDIT_BLOCKS = {"joint_blocks": ("transformer_blocks", _MMDIT)}
_FLUX2_BLOCKS: _Blocks = {
    "double_blocks": (
        "transformer_blocks",
        {
            **{name: parts for name, parts in _FLUX_DOUBLE.items() if "_attn_" in name},
            "img_mlp_0": ("ff.linear_in",),
            "img_mlp_2": ("ff.linear_out",),
            "txt_mlp_0": ("ff_context.linear_in",),
            "txt_mlp_2": ("ff_context.linear_out",),
        },
    ),
    "single_blocks": (
        "single_transformer_blocks",
        {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
    ),
}
_FLUX2_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in_in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img_lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt_lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation_lin": "single_stream_modulation.linear",
}
_Z_IMAGE_BLOCKS = {name: (name, _Z_IMAGE) for name in ("layers", "noise_refiner", "context_refiner")}
_Z_IMAGE_ENDS = {
    "t_embedder_mlp_0": "t_embedder.mlp.0",
    "t_embedder_mlp_2": "t_embedder.mlp.2",
    "cap_embedder_1": "cap_embedder.1",
    "x_embedder": "all_x_embedder.2-1",
    "final_layer_linear": "all_final_layer.2-1.linear",
    "final_layer_adaLN_modulation_1": "all_final_layer.2-1.adaLN_modulation.1",
}
_QWEN_IMAGE = (
    *(f"attn.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
    *(f"attn.add_{leaf}_proj" for leaf in ("q", "k", "v")),
    *(f"{side}_{leaf}" for side in ("img", "txt") for leaf in ("mlp.net.0.proj", "mlp.net.2", "mod.1")),
)
_QWEN_IMAGE_ENDS = (
    *("img_in", "txt_in", "norm_out.linear", "proj_out"),
    *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
)
_KREA2 = (
    *(f"attn.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_gate", "to_out.0")),
    *(f"ff.{leaf}" for leaf in ("gate", "up", "down")),
)
_KREA2_ENDS = (
    *("img_in", "time_mod_proj", "text_fusion.projector", "final_layer.linear"),
    *(f"{part}.linear_{number}" for part in ("time_embed", "txt_in") for number in (1, 2)),
)


_LUMINA2 = (
    *(f"attn.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"feed_forward.linear_{number}" for number in (1, 2, 3)),
    "norm1.linear",
)
_LUMINA2_ENDS = (
    *("x_embedder", "time_caption_embed.caption_embedder.1", "norm_out.linear_1", "norm_out.linear_2"),
    *(f"time_caption_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
)


_SANA = (
    *(f"attn{number}.{leaf}" for number in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"ff.conv_{leaf}" for leaf in ("inverted", "depth", "point")),
)
_SANA_ENDS = (
    *("patch_embed.proj", "time_embed.linear", "proj_out"),
    *(f"time_embed.emb.timestep_embedder.linear_{number}" for number in (1, 2)),
    *(f"caption_projection.linear_{number}" for number in (1, 2)),
)


def _as_in_diffusers(blocks: Mapping[str, tuple[str, ...]], ends: tuple[str, ...]) -> tuple[_Blocks, Mapping[str, str]]:
    """The layers of a family whose files have diffusers' names. blocks: their layers."""
    flat = {
        block.replace(".", "_"): (block, {leaf.replace(".", "_"): (leaf,) for leaf in leaves})
        for block, leaves in blocks.items()
    }
    return flat, {end.replace(".", "_"): end for end in ends}


MLP_RATIO = 4  # of every FLUX.1 single-stream block
_XLABS = {  # the names of XLabs' trainer for FLUX
    "double_blocks": {
        "qkv1": _FLUX_DOUBLE["img_attn_qkv"],
        "qkv2": _FLUX_DOUBLE["txt_attn_qkv"],
        "proj1": _FLUX_DOUBLE["img_attn_proj"],
        "proj2": _FLUX_DOUBLE["txt_attn_proj"],
    },
    "single_blocks": {"qkv": _FLUX_SINGLE["linear1"][:3], "proj": _FLUX_SINGLE["linear2"]},
}
_SGM_ENDS = {
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
_SGM_MIDDLE = {0: "resnets.0", 1: "attentions.0", 2: "resnets.1"}
LAYOUTS: dict[str, tuple[_Blocks, Mapping[str, str]]] = {
    "unet": ({}, _SGM_ENDS),
    "flux": ({**_FLUX_BLOCKS, **_CHROMA_BLOCKS}, {**_FLUX_ENDS, **_CHROMA_ENDS, **_LAST}),
    "flux2": (_FLUX2_BLOCKS, {**_FLUX2_ENDS, **_LAST}),
    "sd3": (_MMDIT_BLOCKS, {**_MMDIT_ENDS, **_LAST}),
    "z-image": (_Z_IMAGE_BLOCKS, _Z_IMAGE_ENDS),
    "qwen-image": _as_in_diffusers({"transformer_blocks": _QWEN_IMAGE}, _QWEN_IMAGE_ENDS),
    "lumina2": _as_in_diffusers(
        {block: _LUMINA2 for block in ("layers", "noise_refiner", "context_refiner")}, _LUMINA2_ENDS
    ),
    "sana": _as_in_diffusers({"transformer_blocks": _SANA}, _SANA_ENDS),
    "krea2": _as_in_diffusers(
        {
            block: _KREA2
            for block in ("transformer_blocks", "text_fusion.layerwise_blocks", "text_fusion.refiner_blocks")
        },
        _KREA2_ENDS,
    ),
}
"""The layers of the original releases by family: {block: (its name in diffusers, its layers)}, and those outside."""
_SGM_RESIDUAL = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}


def original_paths(name: str, family: str, unet_layers: int) -> tuple[str, ...]:
    """The modules in diffusers of a layer of an original release; one matrix can be several modules.

    Any other name is returned unchanged.

    name: with underscores for dots, such as double_blocks_3_img_attn_qkv. family: of the model, a key of LAYOUTS.
    unet_layers: residual layers of a block.
    """
    blocks, ends = LAYOUTS[family]
    if name in ends:
        return (ends[name],)
    if (match := re.fullmatch(r"(\w+?)_(\d+)_(\w+)", name)) and match[1] in blocks:
        theirs, leaves = blocks[match[1]]
        parts = leaves.get(match[3]) or _XLABS.get(match[1], {}).get(match[3])
        if parts is not None:
            return tuple(f"{theirs}.{match[2]}.{part}" for part in parts)
    if family == "unet" and (match := re.fullmatch(r"(input|middle|output)_blocks?_(\d+)(?:_(\d+))?_(\D\w*)", name)):
        return (_of_sgm(match[1], int(match[2]), match[3], match[4], unet_layers + 1),)
    return (name,)


def _of_sgm(where: str, number: int, kind: str | None, leaf: str, per_block: int) -> str:
    """SGM and CompVis number all blocks in one sequence; a sampler is a layer of its own or the end of one."""
    block, layer = divmod(number - (where == "input"), per_block)
    is_last = layer == per_block - 1
    group = {"0": "resnets", "1": "attentions"}.get(kind or "", "")
    leaf = _SGM_RESIDUAL.get(leaf, leaf)
    if where == "middle" and kind is None:
        return f"mid_block.{_SGM_MIDDLE.get(number, '')}.{leaf}"
    if where == "input" and is_last:
        return f"down_blocks.{block}.downsamplers.0.conv" if (group, leaf) == ("resnets", "op") else ""
    if where == "output" and leaf == "conv":
        return f"up_blocks.{block}.upsamplers.0.conv" if is_last else ""
    return f"{'down' if where == 'input' else 'up'}_blocks.{block}.{group}.{layer}.{leaf}"


def split(name: str, modules: tuple[str, ...], factors: Factors, file: Path) -> Lora:
    """The factors of one layer, split into those of its modules in diffusers, each with its rows of `up`.

    name: in the file. name and file are for messages.

    Raises:
        ValueError: the number of rows does not fit these modules.
    """
    if len(modules) == 1:
        return {modules[0]: swapped(name.replace(".", "_"), modules[0], factors)}
    width, rows = factors.down.shape[1], factors.up.shape[0]
    sizes = [width] * 3 + [MLP_RATIO * width] * (len(modules) - 3)
    if sum(sizes) != rows:
        raise ValueError(f"{name} in {file} has {rows} rows for an input of {width}: load the model it was made for")
    found = {}
    for module, up in zip(modules, factors.up.split(sizes), strict=True):
        used = up.abs().sum(0) != 0
        if used.any() or not factors.up.any():
            used = used if used.any() else ~used
            found[module] = Factors(factors.down[used], up[:, used].contiguous(), factors.scale)
    return found


def swapped(leaf: str, module: str, factors: Factors) -> Factors:
    """If a norm has only shift and scale, the original release stores them in the opposite order.

    leaf: the end of the layer's name there. module: its path in diffusers.
    """
    is_last = "final_layer" in leaf or factors.up.shape[0] == 2 * factors.down.shape[1]
    if not leaf.endswith("adaLN_modulation_1") or not is_last or "norm" not in module:
        return factors
    return Factors(factors.down, torch.cat(factors.up.chunk(2)[::-1]), factors.scale)
