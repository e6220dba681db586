"""Adapters with kohya's names: names, alpha, metadata, and the same pictures through diffusers' own loader."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open

from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.models.lora.kohya_file import KOHYA_NAME, kohya_metadata, save_kohya_lora
from alignprop_fast.models.lora.load_save import save_lora

from ...adapters import draw_factors


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipe("red cat", num_inference_steps=2, generator=generator, output_type="pt").images


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (3, 12)])
def test_diffusers_draws_the_same_pictures(request, tmp_path, model, rank, alpha):
    pipe, folder = request.getfixturevalue(model), request.getfixturevalue(f"{model}_folder")
    untrained = draw(pipe)
    draw_factors(add_lora(pipe, rank, alpha))
    save_kohya_lora(pipe, tmp_path)
    kind = StableDiffusionXLPipeline if model == "tiny_sdxl" else StableDiffusionPipeline
    other = kind.from_pretrained(folder, local_files_only=True)
    other.load_lora_weights(tmp_path, weight_name=KOHYA_NAME)
    assert (draw(pipe) - untrained).abs().max() > 1e-2
    torch.testing.assert_close(draw(other), draw(pipe), rtol=0, atol=1e-5)


def test_names_and_alphas_are_those_of_kohya(tiny_sd, tmp_path):
    add_lora(tiny_sd, rank=3, alpha=12)
    with safe_open(save_kohya_lora(tiny_sd, tmp_path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    names = {key.split(".")[0] for key in tensors}
    assert {key.split(".", 1)[1] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert len(tensors) == 3 * len(names)
    block = r"(down_blocks_\d+|up_blocks_\d+|mid_block)_attentions_\d+_transformer_blocks_\d+"
    assert all(re.fullmatch(rf"lora_unet_{block}_attn[12]_to_(q|k|v|out_0)", name) for name in names)
    assert all(
        tensors[f"{name}.alpha"].item() == 12 and len(tensors[f"{name}.lora_down.weight"]) == 3 for name in names
    )


def test_a_folder_with_both_files_loads_by_itself(tiny_sd, tiny_sd_folder, tmp_path):
    draw_factors(add_lora(tiny_sd))
    save_lora(tiny_sd, tmp_path)
    save_kohya_lora(tiny_sd, tmp_path)
    other = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, local_files_only=True)
    other.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(other), draw(tiny_sd), rtol=0, atol=1e-5)


def test_metadata(tiny_sd, tmp_path):
    add_lora(tiny_sd, rank=3, alpha=12)
    options = {"steps": 7, "seed": 0, "learning_rate": 1e-3, "other": 1}
    texts = {"base_model": "some/model", "title": "t", "comment": "c", "prompts": ["a cat", "a dog"]}
    found = kohya_metadata(tiny_sd, **texts, options=options)
    file = save_kohya_lora(tiny_sd, tmp_path, found)
    assert file.read_bytes() == save_kohya_lora(tiny_sd, tmp_path, found).read_bytes()
    with safe_open(file, framework="pt") as opened:
        written = opened.metadata()
    assert written.items() >= {"format": "pt", "ss_network_module": "networks.lora", **found}.items()
    assert (written["ss_network_dim"], written["ss_network_alpha"], written["ss_steps"]) == ("3", "12.0", "7")
    assert found["ss_sd_model_name"] == "some/model" and found["ss_seed"] == "0"
    assert json.loads(found["ss_tag_frequency"]) == {"prompts": {"a cat": 1, "a dog": 1}}
    assert "ss_base_model_version" not in found  # of no family that these keys have a name for
    tiny_sd.unet.register_to_config(cross_attention_dim=768)
    assert kohya_metadata(tiny_sd, **texts, options={})["ss_base_model_version"] == "sd_v1"


@pytest.mark.parametrize(
    ("model", "module", "architecture"),
    [("tiny_flux", "networks.lora_flux", "flux-1-dev/lora"), ("tiny_sd3", "networks.lora_sd3", None)],
)
def test_metadata_of_transformers(request, tmp_path, model, module, architecture):
    pipe = request.getfixturevalue(model)
    add_lora(pipe, rank=3, alpha=12)
    found = kohya_metadata(pipe, base_model="m", title="t", comment="c", prompts=["a cat"], options={})
    with safe_open(save_kohya_lora(pipe, tmp_path, found), framework="pt") as opened:
        written = opened.metadata()
    assert written["ss_network_module"] == module and written.get("modelspec.architecture") == architecture
    assert "modelspec.prediction_type" not in written
    if model == "tiny_sd3":
        pipe.transformer.register_to_config(num_layers=24)
        found = kohya_metadata(pipe, base_model="m", title="t", comment="c", prompts=[], options={})
        assert found["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora"


def test_saving_without_adapters_is_refused(tiny_sd, tmp_path):
    with pytest.raises(ValueError, match="add_lora"):
        save_kohya_lora(tiny_sd, tmp_path)


@pytest.mark.parametrize("save", [save_lora, save_kohya_lora])
def test_a_full_disk_leaves_the_file_that_was_there(files_up_to, tiny_sd, tmp_path, save):
    draw_factors(add_lora(tiny_sd))
    file = save(tiny_sd, tmp_path)
    before = file.read_bytes()
    with files_up_to(500), pytest.raises(OSError, match="File too large"):
        save(tiny_sd, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {file: before}
