"""Converts weights of an open_clip `CLIP` to the names and the layout of transformers' `CLIPModel`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_PREFIXES = {
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # spelled so in transformers
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
_INSIDE_A_BLOCK = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
_UNUSED = ("attn_mask",)  # the causal mask, which old versions of open_clip saved too


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under new names, with projections transposed and the joint q, k, v weights split in three.

    Unknown names are kept, so that filling a model with the result fails with a message about them.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in _UNUSED:
            continue
        if name in _TRANSPOSED:
            result[_TRANSPOSED[name]] = tensor.t().contiguous()
            continue
        new = _renamed(name)
        block, joint, kind = new.partition(".attn.in_proj_")
        if joint:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{block}.self_attn.{part}_proj.{kind}"] = piece
        else:
            result[new] = tensor
    return result


def _renamed(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    for prefix, new in _PREFIXES.items():
        if name.startswith(prefix):
            name = new + name.removeprefix(prefix)
            for inside, outside in _INSIDE_A_BLOCK.items():
                name = name.replace(inside, outside)
            return name
    return name
