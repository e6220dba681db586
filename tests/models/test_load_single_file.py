"""One .safetensors file in the layouts that are passed around, with another model's folder for the configurations."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignprop_fast.models.load import load_pipeline
from alignprop_fast.models.lora_targets import denoiser

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Of a UNet of two levels with one layer each: attention in the first level alone.
UNET_BLOCKS = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_unet_name(name):
    for theirs, ldm in {**UNET_BLOCKS, **UNET_ENDS}.items():
        if name.startswith(theirs + "."):
            rest = name.removeprefix(theirs)
            for inner, old in RESIDUAL.items():
                rest = rest.replace(f".{inner}.", f".{old}.") if ".resnets." in theirs else rest
            return f"model.diffusion_model.{ldm}{rest}"
    raise AssertionError(name)


def ldm_vae_name(name):
    """For two levels of one layer (two in the decoder)."""
    name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    up = {"0": "1", "1": "0"}
    name = re.sub(r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.up.{up[m[1]]}.block.{m[2]}", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{up[m[1]]}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for theirs, old in attention.items():
        name = name.replace(f"mid_block.attentions.0.{theirs}.", f"mid.attn_1.{old}.")
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    return f"first_stage_model.{name}"


def ldm_file(folder, path):
    """A Stable Diffusion 1.x folder's weights in one file, in the original layout."""
    state = {ldm_unet_name(name): tensor for name, tensor in weights(folder / "unet").items()}
    for name, tensor in weights(folder / "vae").items():
        old = ldm_vae_name(name)
        is_matrix = ".attn_1." in old and old.endswith("weight") and "norm" not in old
        state[old] = tensor[:, :, None, None] if is_matrix else tensor
    for name, tensor in weights(folder / "text_encoder").items():
        state[f"cond_stage_model.transformer.{name}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def weights(folder):
    return load_file(next(folder.glob("*.safetensors")))


@pytest.fixture
def configuration(tiny_sd_folder, tmp_path):
    """The folder of a model of the same architecture, without any weights."""
    return shutil.copytree(tiny_sd_folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))


def test_stable_diffusion_in_the_original_layout(tiny_sd, tiny_sd_folder, configuration, tmp_path):
    pipe = load_pipeline(ldm_file(tiny_sd_folder, tmp_path / "model.safetensors"), model_config=configuration)
    for part in ("unet", "vae", "text_encoder"):
        mine, theirs = getattr(pipe, part).state_dict(), getattr(tiny_sd, part).state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), part
    images = [
        one("red cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for one in (pipe, tiny_sd)
    ]
    assert torch.equal(*images)


def test_a_file_without_vae_takes_the_folders(tiny_sd_folder, tmp_path):
    file = ldm_file(tiny_sd_folder, tmp_path / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in load_file(file).items() if "first_stage" not in name}, file)
    pipe = load_pipeline(file, model_config=tiny_sd_folder)
    assert torch.equal(pipe.unet.conv_in.weight, 2 * weights(tiny_sd_folder / "unet")["conv_in.weight"])
    assert torch.equal(pipe.vae.decoder.conv_in.weight, weights(tiny_sd_folder / "vae")["decoder.conv_in.weight"])


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_transformer_alone_takes_the_rest_from_the_folder(kind, request, tmp_path):
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    state = {name: 2 * tensor for name, tensor in weights(folder / "transformer").items()}
    save_file(state, tmp_path / "model.safetensors")
    pipe = load_pipeline(tmp_path / "model.safetensors", dtype=torch.bfloat16, model_config=folder)
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype))
    assert denoiser(pipe).dtype == pipe.vae.dtype == torch.bfloat16
    assert torch.equal(pipe.vae.decoder.conv_in.weight, weights(folder / "vae")["decoder.conv_in.weight"].bfloat16())


def test_what_goes_wrong(tiny_sd_folder, tiny_sdxl_folder, configuration, tmp_path):
    file = ldm_file(tiny_sd_folder, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="--model-config FOLDER"):
        load_pipeline(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_pipeline(file, model_config=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="leave it out"):
        load_pipeline(tiny_sd_folder, model_config=configuration)
    with pytest.raises(ValueError, match="same architecture"):
        load_pipeline(file, model_config=tiny_sdxl_folder)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        load_pipeline(file, model_config=configuration)
