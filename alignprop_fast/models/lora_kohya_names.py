"""The names that kohya's scripts, ComfyUI, Forge and others give LoRA factors, and the way back to diffusers' names.

    unet.mid_block.attentions.0 ... to_q               ->  lora_unet_mid_block_attentions_0 ... to_q
    transformer.transformer_blocks.3.attn.to_out.0     ->  lora_unet_double_blocks_3_img_attn_proj     (FLUX)
    transformer.transformer_blocks.3.attn.{to_q,to_k,to_v}  ->  lora_unet_joint_blocks_3_x_block_attn_qkv   (SD3)

with the suffixes .lora_down.weight, .lora_up.weight and .alpha (scale = alpha / rank). UNets keep diffusers' block
names, which all readers know; files in SGM's names, as kohya's scripts write SDXL, are read too. The transformers have
the names of their original releases, where several projections are one matrix: of factors (A_i, B_i) of its parts

    down = [A_1; A_2; ...]     up = diag(B_1, B_2, ...)

is the same delta, and a part that has no factors keeps zeros. Back, each part takes its rows of `up` and of these the
columns that are not all zero: of a block-diagonal file the very factors that went in, of another one `down` whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch

from alignprop_fast.models.lora_file import Factors, Lora, make_factors

PREFIX = "lora_unet_"

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
_MMDIT_BLOCKS = {"joint_blocks": ("transformer_blocks", _MMDIT)}
_MLP_RATIO = 4  # of FLUX's single-stream blocks, everywhere
_FLUX_WIDTH = 3072
_SGM_LAYERS = 2  # of a block of SDXL, the one UNet whose files have SGM's names


def to_kohya(lora: Lora) -> dict[str, torch.Tensor]:
    """The tensors of a file in kohya's naming.

    Raises:
        ValueError: a module that these names have no place for.
    """
    whole: Lora = {}
    modules = dict(lora)
    if any(module.startswith("transformer.") for module in modules):
        whole, modules = _original(modules)
    for module, factors in modules.items():
        whole[_flat(module)] = factors
    tensors = {}
    for name, factors in whole.items():
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = factors.down, factors.up
        tensors[f"{name}.alpha"] = torch.tensor(float(factors.scale * factors.rank))
    return tensors


def _flat(module: str) -> str:
    part, _, name = module.partition(".")
    prefixes = {"unet": PREFIX, "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    if part not in prefixes:
        raise ValueError(f"{module} has no name in kohya's files: leave its adapters out")
    return prefixes[part] + name.replace(".", "_")


def is_flux(lora: Lora) -> bool:
    """Whether the adapters of a transformer are FLUX's: by its single-stream blocks or, without any, by its width."""
    names = "".join(lora)
    widths = {factors.down.shape[1] for module, factors in lora.items() if ".attn.to_q" in module}
    return "single_transformer_blocks" in names or ("attn2." not in names and widths == {_FLUX_WIDTH})


def _original(modules: Lora) -> tuple[Lora, Lora]:
    """(a transformer's modules under the names of its original release, what is left over)."""
    whole: Lora = {}
    flux = is_flux(modules)
    for old, (theirs, leaves) in (_FLUX_BLOCKS if flux else _MMDIT_BLOCKS).items():
        pattern = re.compile(rf"transformer\.{theirs}\.(\d+)\..*")
        for i in sorted({int(match[1]) for module in modules if (match := pattern.fullmatch(module))}):
            for leaf, parts in leaves.items():
                names = [f"transformer.{theirs}.{i}.{part}" for part in parts]
                held = [modules.pop(name, None) for name in names]
                if any(factors is not None for factors in held):
                    whole[f"{PREFIX}{old}_{i}_{leaf}"] = _swapped(leaf, _joined(parts, held))
    for old, theirs in {**(_FLUX_ENDS if flux else _MMDIT_ENDS), **_LAST}.items():
        if (factors := modules.pop(f"transformer.{theirs}", None)) is not None:
            whole[PREFIX + old] = _swapped(old, factors)
    return whole, modules


def _joined(parts: tuple[str, ...], held: list[Factors | None]) -> Factors:
    """The factors of the matrix that is made up of the parts' rows."""
    present = [factors for factors in held if factors is not None]
    if len(parts) == 1:
        return present[0]
    scales = {factors.scale for factors in present}
    scale = scales.pop() if len(scales) == 1 else 1.0
    ups, columns = [], sum(factors.rank for factors in present)
    at, width = 0, present[0].down.shape[1]
    for part, factors in zip(parts, held, strict=True):
        if factors is None:
            ups.append(torch.zeros((_MLP_RATIO if part == "proj_mlp" else 1) * width, columns))
            continue
        up = factors.up if factors.scale == scale else factors.scaled_up()
        ups.append(torch.nn.functional.pad(up, (at, columns - at - factors.rank)))
        at += factors.rank
    return Factors(torch.cat([factors.down for factors in present]), torch.cat(ups), scale)


def _swapped(leaf: str, factors: Factors) -> Factors:
    """Where a norm has shift and scale alone, the original release has them the other way round."""
    is_last = leaf.startswith("final_layer") or factors.up.shape[0] == 2 * factors.down.shape[1]
    if not leaf.endswith("adaLN_modulation_1") or not is_last:
        return factors
    return Factors(factors.down, torch.cat(factors.up.chunk(2)[::-1]), factors.scale)


def from_kohya(tensors: Mapping[str, torch.Tensor], file: Path) -> Lora:
    """The modules of a file in kohya's naming, under diffusers' names. `file`: for messages.

    Raises:
        ValueError: names of no known kind, or factors that do not fit each other.
    """
    whole: Lora = {}
    for name in sorted({key.partition(".")[0] for key in tensors}):
        down, up = tensors.get(f"{name}.lora_down.weight"), tensors.get(f"{name}.lora_up.weight")
        if down is None:
            raise _unknown(file, name)
        alpha = float(tensors.get(f"{name}.alpha", torch.tensor(float(len(down)))))
        whole[name] = make_factors(file, name, down, up, alpha / len(down))
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    strange = set(tensors) - {f"{name}.{end}" for name in whole for end in ends}
    if strange:
        raise _unknown(file, min(strange))
    lora: Lora = {}
    unet: Lora = {}
    is_transformer = any(re.search("(double|single|joint)_blocks_", name) for name in whole)
    for name, factors in whole.items():
        if not name.startswith(PREFIX):
            lora[_text_module(name, file)] = factors
        elif is_transformer:
            lora |= _parts(name.removeprefix(PREFIX), factors, any("joint_blocks_" in one for one in whole), file)
        else:
            unet[name] = factors
    return lora | (_unet_modules(unet, file) if unet else {})


def _unknown(file: Path, name: str) -> ValueError:
    return ValueError(f"{file} has {name!r}, which is no name of kohya's files: give a file in diffusers' naming")


def _text_module(name: str, file: Path) -> str:
    match = re.fullmatch(r"lora_te([12]?)_text_model_encoder_layers_(\d+)_(self_attn|mlp)_(\w+)", name)
    if match is None:
        raise _unknown(file, name)
    part = "text_encoder_2" if match[1] == "2" else "text_encoder"
    return f"{part}.text_model.encoder.layers.{match[2]}.{match[3]}.{match[4]}"


def _parts(name: str, factors: Factors, is_mmdit: bool, file: Path) -> Lora:
    """One matrix of the original release as the modules that it is made up of."""
    ends = {**(_MMDIT_ENDS if is_mmdit else _FLUX_ENDS), **_LAST}
    if name in ends:
        return {f"transformer.{ends[name]}": _swapped(name, factors)}
    match = re.fullmatch(r"([a-z]+_blocks)_(\d+)_(\w+)", name)
    theirs, leaves = (_MMDIT_BLOCKS if is_mmdit else _FLUX_BLOCKS).get(match[1] if match else "", ("", {}))
    if match is None or match[3] not in leaves:
        raise _unknown(file, PREFIX + name)
    parts, prefix = leaves[match[3]], f"transformer.{theirs}.{match[2]}."
    if len(parts) == 1:
        return {prefix + parts[0]: _swapped(match[3], factors)}
    width, rows = factors.down.shape[1], factors.up.shape[0]
    sizes = [width] * 3 + [rows - 3 * width] * (len(parts) - 3)
    if sum(sizes) != rows or min(sizes) <= 0:
        raise ValueError(f"{PREFIX + name} in {file} has {rows} rows for an input of {width}: it is of another model")
    found = {}
    for part, up in zip(parts, factors.up.split(sizes), strict=True):
        used = up.abs().sum(0) != 0
        if used.any() or not factors.up.any():
            used = used if used.any() else ~used
            found[prefix + part] = Factors(factors.down[used], up[:, used].contiguous(), factors.scale)
    return found


def _unet_modules(unet: Lora, file: Path) -> Lora:
    """A UNet's modules by diffusers' own rules for kohya's names."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    from alignprop_fast.models.lora_file import DOWN, UP

    state = {}
    for name, factors in unet.items():
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = factors.down, factors.scaled_up()
    try:
        sgm = SimpleNamespace(layers_per_block=_SGM_LAYERS)
        state, _ = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=sgm)
        state = convert_unet_state_dict_to_peft(state)
        modules = sorted(key.removesuffix(DOWN) for key in state if key.endswith(DOWN))
        return {module: make_factors(file, module, state[module + DOWN], state[module + UP], 1.0) for module in modules}
    except (KeyError, IndexError, ValueError) as error:
        raise _unknown(file, min(unet)) from error
