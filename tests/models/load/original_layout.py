"""Weights of diffusers folders with the original releases' names: CompVis' and SGM's UNets, MMDiT, BFL's FLUX.

The way back from what `from_single_file` converts, for the small models of the tests; and one file in that layout.
"""

import re

import torch
from safetensors.torch import load_file, save_file

UNET_PREFIX = "model.diffusion_model."
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# The places of the parts in the original's fused layers, and other names.
MMDIT_FUSED = {
    "attn.{to_q,to_k,to_v}": "x_block.attn.qkv",
    "attn.{add_q_proj,add_k_proj,add_v_proj}": "context_block.attn.qkv",
    "attn2.{to_q,to_k,to_v}": "x_block.attn2.qkv",
}
MMDIT = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
MMDIT_ENDS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX_DOUBLE_FUSED = {
    "attn.{to_q,to_k,to_v}": "img_attn.qkv",
    "attn.{add_q_proj,add_k_proj,add_v_proj}": "txt_attn.qkv",
}
FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_SINGLE_FUSED = {"{attn.to_q,attn.to_k,attn.to_v,proj_mlp}": "linear1"}
FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out": "linear2",
}
FLUX2_DOUBLE = {
    **{theirs: old for theirs, old in FLUX_DOUBLE.items() if theirs.startswith("attn.")},
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
FLUX2_SINGLE = {
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}
FLUX2_ENDS = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX_ENDS = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
OPEN_CLIP = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "layer_norm": "ln_",
    "text_projection.weight": "text_projection",
}


def weights(folder):
    return load_file(next(folder.glob("*.safetensors")))


def unet_blocks(levels, layers):
    """Names of a UNet's blocks; the last level has no attention, as in Stable Diffusion 1.x."""
    names, n = {}, 1
    for level in range(levels):
        for layer in range(layers):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{n}.0"
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{n}.1"
            n += 1
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
        n += 1
    names |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    names |= {"mid_block.resnets.1": "middle_block.2"}
    for level in range(levels):
        for layer in range(layers + 1):
            n = level * (layers + 1) + layer
            names[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{n}.0"
            names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{n}.1"
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{n}.{1 if level == 0 else 2}.conv"
    return names


def unet(state, levels=2, layers=1):
    """A UNet's weights under CompVis' and SGM's names."""
    names = {**unet_blocks(levels, layers), **UNET_ENDS}
    return {_unet_name(name, names): tensor for name, tensor in state.items()}


def _unet_name(name, names):
    theirs = next(one for one in names if name.startswith(one + "."))
    rest = name.removeprefix(theirs)
    if ".resnets." in theirs:
        inner, end = rest[1:].rsplit(".", 1)
        rest = f".{RESIDUAL[inner]}.{end}"
    return names[theirs] + rest


def vae(state):
    """The weights of a VAE of two levels of one layer (two in the decoder) under CompVis' names."""
    renamed = {}
    for name, tensor in state.items():
        old = _vae_name(name)
        is_matrix = ".attn_1." in old and old.endswith("weight") and "norm" not in old
        renamed[old] = tensor[:, :, None, None] if is_matrix else tensor
    return renamed


def _vae_name(name):
    name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    up = {"0": "1", "1": "0"}
    name = re.sub(r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.up.{up[m[1]]}.block.{m[2]}", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{up[m[1]]}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for theirs, old in attention.items():
        name = name.replace(f"mid_block.attentions.0.{theirs}.", f"mid.attn_1.{old}.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def open_clip(state):
    """A CLIP text encoder's weights under OpenCLIP's names."""
    fused, rest = _fuse(state, {"self_attn.{q_proj,k_proj,v_proj}": "attn.in_proj"})
    renamed = {}
    for name, tensor in {**fused, **rest}.items():
        for theirs, old in OPEN_CLIP.items():
            name = name.replace(theirs, old)
        renamed[name.replace("in_proj.", "in_proj_")] = tensor.T if name == "text_projection" else tensor
    return renamed


def mmdit(state):
    """The weights of an SD3 or SD3.5 transformer under Stability's names."""
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    swapped = ("norm_out.linear.", f"transformer_blocks.{last}.norm1_context.linear.")
    state = {name: _swapped(tensor) if name.startswith(swapped) else tensor for name, tensor in state.items()}
    return _renamed(state, {"transformer_blocks": ("joint_blocks", MMDIT_FUSED, MMDIT)}, MMDIT_ENDS)


def flux(state):
    """The weights of a FLUX.1 transformer under Black Forest Labs' names."""
    state = {name: _swapped(tensor) if name.startswith("norm_out.") else tensor for name, tensor in state.items()}
    blocks = {
        "transformer_blocks": ("double_blocks", FLUX_DOUBLE_FUSED, FLUX_DOUBLE),
        "single_transformer_blocks": ("single_blocks", FLUX_SINGLE_FUSED, FLUX_SINGLE),
    }
    return _renamed(state, blocks, FLUX_ENDS)


def z_image(state):
    """The weights of a Z-Image transformer under its original names."""
    names = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}
    fused, rest = _fuse(state, {"attention.{to_q,to_k,to_v}": "attention.qkv"})
    renamed = {}
    for name, tensor in {**fused, **rest}.items():
        for theirs, old in names.items():
            name = name.replace(f".{theirs}.", f".{old}.")
        renamed[name.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")] = tensor
    return renamed


def flux2(state):
    """The weights of a FLUX.2 transformer under Black Forest Labs' names."""
    state = {name: _swapped(tensor) if name.startswith("norm_out.") else tensor for name, tensor in state.items()}
    blocks = {
        "transformer_blocks": ("double_blocks", FLUX_DOUBLE_FUSED, FLUX2_DOUBLE),
        "single_transformer_blocks": ("single_blocks", {}, FLUX2_SINGLE),
    }
    return _renamed(state, blocks, FLUX2_ENDS)


def _renamed(state, blocks, ends):
    renamed = {}
    for name, tensor in state.items():
        if (group := name.split(".")[0]) not in blocks:
            renamed[_with_name(name, ends)] = tensor
    for group, (old, fused, others) in blocks.items():
        inside = {name: tensor for name, tensor in state.items() if name.startswith(group + ".")}
        together, rest = _fuse(inside, fused)
        for name, tensor in {**together, **{_with_name(name, others): tensor for name, tensor in rest.items()}}.items():
            renamed[old + name.removeprefix(group)] = tensor
    return renamed


def _with_name(name, names):
    """The name, with the part between dots that is in `names` replaced."""
    for theirs, old in names.items():
        if f".{theirs}." in f".{name}.":
            return f".{name}.".replace(f".{theirs}.", f".{old}.")[1:-1]
    raise AssertionError(name)


def _fuse(state, groups):
    """(tensors that the original joins into one, the rest). groups: "a.{b,c}" -> name of the whole."""
    fused, rest = {}, dict(state)
    for pattern, whole in groups.items():
        before, inner = pattern.rstrip("}").split("{")
        parts = [before + part for part in inner.split(",")]
        for name in [name for name in state if f".{parts[0]}." in name]:
            tensors = [rest.pop(name.replace(parts[0], part)) for part in parts]
            fused[name.replace(parts[0], whole)] = torch.cat(tensors)
    return fused, rest


def _swapped(tensor):
    """Swap shift and scale."""
    return torch.cat(tensor.chunk(2)[::-1])


def whole_file(folder, path, layers=1):
    """Write a Stable Diffusion 1.x or SDXL folder's weights into one file, in the original layout."""
    state = {UNET_PREFIX + name: tensor for name, tensor in unet(weights(folder / "unet"), layers=layers).items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in vae(weights(folder / "vae")).items()}
    is_xl = (folder / "text_encoder_2").is_dir()
    clip = "conditioner.embedders.0.transformer." if is_xl else "cond_stage_model.transformer."
    state |= {clip + name: tensor for name, tensor in weights(folder / "text_encoder").items()}
    if is_xl:
        second = open_clip(weights(folder / "text_encoder_2"))
        state |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    return write(state, path)


def write(state, path):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path
