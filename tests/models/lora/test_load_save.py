"""Adapters: what is trained, and the round trip through files and through diffusers' own loader."""

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open

from alignprop_fast.models import adapt
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.models.lora.load_save import has_lora, load_lora, save_lora
from alignprop_fast.models.lora.targets import TARGETS, denoiser


def _noise_prediction(pipe):
    generator = torch.Generator().manual_seed(3)
    x_BCHW = torch.randn(1, 4, 8, 8, generator=generator)
    text_BLC = torch.randn(1, 77, pipe.unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return pipe.unet(x_BCHW, 500, text_BLC, return_dict=False)[0]


def _train_a_little(parameters):
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def test_only_adapters_train_and_nothing_changes_at_first(tiny_sd):
    before = _noise_prediction(tiny_sd)
    parameters = add_lora(tiny_sd, rank=3, alpha=6)
    names = [name for name, parameter in tiny_sd.unet.named_parameters() if parameter.requires_grad]
    assert len(names) == len(parameters) == sum("lora_" in name for name, _ in tiny_sd.unet.named_parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert all(3 in parameter.shape for parameter in parameters)
    torch.testing.assert_close(_noise_prediction(tiny_sd), before, rtol=0, atol=0)


def test_adapters_stay_fp32_on_a_half_precision_model(tiny_sd):
    tiny_sd.unet.to(torch.bfloat16)
    assert {parameter.dtype for parameter in add_lora(tiny_sd)} == {torch.float32}


@pytest.mark.parametrize("rank, alpha", [(4, 4), (3, 12)])
def test_diffusers_loads_what_we_save(tiny_sd, tiny_sd_folder, tmp_path, rank, alpha):
    from diffusers import StableDiffusionPipeline

    _train_a_little(add_lora(tiny_sd, rank, alpha))
    save_lora(tiny_sd, tmp_path, {"reward": "colorfulness"})
    other = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, local_files_only=True)
    before = _noise_prediction(other)
    other.load_lora_weights(tmp_path)
    # alpha != rank is lost by loaders that ignore the header, and the scale with it
    torch.testing.assert_close(_noise_prediction(other), _noise_prediction(tiny_sd), rtol=1e-6, atol=1e-6)
    assert (_noise_prediction(other) - before).abs().max() > 1e-2
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert file.metadata()["reward"] == "colorfulness"
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_sdxl_round_trip(tiny_sdxl, tmp_path):
    parameters = add_lora(tiny_sdxl)
    _train_a_little(parameters)
    saved = [parameter.detach().clone() for parameter in parameters]
    save_lora(tiny_sdxl, tmp_path)
    _train_a_little(parameters)
    load_lora(tiny_sdxl, tmp_path)
    for parameter, expected in zip(parameters, saved, strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux"])
def test_targets_of_every_model_round_trip_through_diffusers(model, targets, request, tmp_path):
    pipe = request.getfixturevalue(model)
    parameters = add_lora(pipe, 2, 6, targets)
    if targets != "attention":
        assert any(".ff." in name for name, parameter in denoiser(pipe).named_parameters() if parameter.requires_grad)
    assert any(parameter.ndim == 4 for parameter in parameters) == (
        targets == "all" and model in ("tiny_sd", "tiny_sdxl")
    )
    _train_a_little(parameters)
    save_lora(pipe, tmp_path)
    other = type(pipe).from_pretrained(request.getfixturevalue(f"{model}_folder"), local_files_only=True)
    other.load_lora_weights(tmp_path)
    mine, theirs = (
        [p.detach() for name, p in sorted(denoiser(one).named_parameters()) if "lora_" in name] for one in (pipe, other)
    )
    assert len(mine) == len(parameters)
    assert all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))
    scales = {
        scale for module in denoiser(other).modules() if hasattr(module, "scaling") for scale in module.scaling.values()
    }
    assert scales == {3.0}


def test_unknown_targets_are_refused(tiny_sd):
    with pytest.raises(ValueError, match=r"attention, attention\+ff, all"):
        add_lora(tiny_sd, targets="everything")


def test_dora_is_refused(tiny_sd, tmp_path):
    tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
    with pytest.raises(ValueError, match=r"DoRA.*use_dora=False"):
        adapt(tiny_sd).trainable()
    with pytest.raises(ValueError, match="use_dora in its LoraConfig"):
        save_lora(tiny_sd, tmp_path)


def test_a_file_for_another_base_model_is_refused(tiny_sd, tmp_path):
    """As diffusers writes it if given the configuration; with PiSSA the base model becomes W - B A."""
    file = write_with_settings(tiny_sd, tmp_path, {"init_lora_weights": "pissa"})
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa', which changed the base model: save it again"):
        load_lora(tiny_sd, file)


def write_with_settings(pipe, folder, settings):
    from peft.utils import get_peft_model_state_dict

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    config = {**pipe.unet.peft_config["default"].to_dict(), "target_modules": ["to_q"], **settings}
    layers = get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    pipe.unload_lora_weights()
    return folder


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tiny_sd, tmp_path):
    _train_a_little(add_lora(tiny_sd))
    before = save_lora(tiny_sd, tmp_path).read_bytes()
    with torch.no_grad():
        tiny_sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite: take an earlier checkpoint"):
        save_lora(tiny_sd, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert (tmp_path / "pytorch_lora_weights.safetensors").read_bytes() == before


def test_equal_adapters_make_equal_files(tiny_sd, tmp_path):
    """safetensors by itself writes metadata in an order that changes from call to call."""
    _train_a_little(add_lora(tiny_sd))
    files = {save_lora(tiny_sd, tmp_path, {name: "x" for name in "abcdef"}).read_bytes() for _ in range(8)}
    assert len(files) == 1


def test_two_adapters_are_refused(tiny_sd):
    add_lora(tiny_sd)
    with pytest.raises(ValueError, match="already has adapters"):
        add_lora(tiny_sd)


def test_saving_without_adapters_is_refused(tiny_sd, tmp_path):
    assert not has_lora(tiny_sd)
    with pytest.raises(ValueError, match="add_lora"):
        save_lora(tiny_sd, tmp_path)


def test_load_errors_name_the_file(tiny_sd, tmp_path):
    with pytest.raises(FileNotFoundError, match="pytorch_lora_weights"):
        load_lora(tiny_sd, tmp_path)
    add_lora(tiny_sd, rank=2)
    file = save_lora(tiny_sd, tmp_path)
    tiny_sd.unet.delete_adapters("default")
    tiny_sd.unet.peft_config = {}
    add_lora(tiny_sd, rank=5)
    with pytest.raises(ValueError, match="another rank"):
        load_lora(tiny_sd, tmp_path)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="damaged"):
        load_lora(tiny_sd, tmp_path)
