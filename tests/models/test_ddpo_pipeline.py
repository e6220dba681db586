"""The pipeline class of trl's scripts: its attributes, training and files."""

import contextlib
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.models.lora.load_save import save_lora

from ..adapters import draw_factors, factors_of


def test_attributes_are_those_of_the_pipeline(tiny_sd_folder):
    pipeline = DefaultDDPOStableDiffusionPipeline(str(tiny_sd_folder), pretrained_model_revision="main")
    inner = pipeline.sd_pipeline
    assert pipeline.unet is inner.unet and pipeline.vae is inner.vae and pipeline.scheduler is inner.scheduler
    assert pipeline.tokenizer is inner.tokenizer and pipeline.text_encoder is inner.text_encoder
    assert pipeline.text_encoders == [inner.text_encoder]
    assert pipeline.pretrained_model == str(tiny_sd_folder) and pipeline.use_lora
    assert pipeline.autocast is contextlib.nullcontext
    assert pipeline.scheduler.config.set_alpha_to_one is False


def test_sdxl_has_two_text_encoders(tiny_sdxl_folder):
    pipeline = DefaultDDPOStableDiffusionPipeline(tiny_sdxl_folder)
    assert pipeline.text_encoders == [pipeline.sd_pipeline.text_encoder, pipeline.sd_pipeline.text_encoder_2]


def test_calls_sample(tiny_sd_folder):
    pipeline = DefaultDDPOStableDiffusionPipeline(tiny_sd_folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["red", "a dog"], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 16, 16) and not images.requires_grad


@pytest.mark.parametrize("use_lora", [True, False])
def test_what_is_trainable(tiny_sd_folder, use_lora):
    pipeline = DefaultDDPOStableDiffusionPipeline(tiny_sd_folder, use_lora=use_lora)
    unet = pipeline.get_trainable_layers(rank=2, alpha=2)
    trainable = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trainable) == use_lora and trainable
    frozen = [*pipeline.vae.parameters(), *pipeline.text_encoder.parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)
    assert (pipeline.autocast is None) == (not use_lora)


@pytest.mark.parametrize("use_lora", [True, False])
def test_checkpoint_round_trip_keeps_the_parameters(tiny_sd_folder, tmp_path, use_lora):
    pipeline = DefaultDDPOStableDiffusionPipeline(tiny_sd_folder, use_lora=use_lora)
    parameters = [p for p in pipeline.get_trainable_layers().parameters() if p.requires_grad]
    pipeline.save_checkpoint([pipeline.unet], [], tmp_path)
    saved = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1)
    pipeline.load_checkpoint([pipeline.unet], tmp_path)
    now = [p for p in pipeline.unet.parameters() if p.requires_grad]
    assert all(one is two for one, two in zip(parameters, now, strict=True)), "an optimizer must keep its hold"
    assert all(torch.equal(one, two) for one, two in zip(parameters, saved, strict=True))


def test_lora_in_the_folder_is_trained_on(tiny_sd, tiny_sd_folder, tmp_path):
    parameters = add_lora(tiny_sd, rank=3, alpha=6)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    for path in tiny_sd_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    save_lora(tiny_sd, tmp_path)
    pipeline = DefaultDDPOStableDiffusionPipeline(tmp_path, use_lora=False)
    assert pipeline.use_lora, "LoRA weights in the folder decide, as in trl"
    unet = pipeline.get_trainable_layers(rank=4, alpha=4)
    now = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert all(torch.equal(one, two) for one, two in zip(parameters, now, strict=True))
    assert len(unet.peft_config) == 1


@pytest.mark.parametrize("base", [None, "int8"])
def test_loaded_adapters_are_not_rounded_to_the_precision_of_the_model(tiny_sd, tiny_sd_folder, tmp_path, base):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in add_lora(tiny_sd, rank=3, alpha=6):
            parameter.normal_(generator=generator)
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "model")
    save_lora(tiny_sd, folder)
    pipeline = DefaultDDPOStableDiffusionPipeline(folder)
    if base is None:
        pipeline.unet.to(torch.bfloat16)
    else:
        pipeline.quantize_base(base, torch.device("cpu"), torch.bfloat16)
    unet = pipeline.get_trainable_layers(rank=3, alpha=6)
    expected = [parameter for parameter in tiny_sd.unet.parameters() if parameter.requires_grad]
    now = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert all(torch.equal(one, two) for one, two in zip(expected, now, strict=True))
    assert {parameter.dtype for parameter in now} == {torch.float32} and unet.dtype == torch.bfloat16


def test_a_foreign_model_is_refused(tiny_sd_folder, tmp_path):
    pipeline = DefaultDDPOStableDiffusionPipeline(tiny_sd_folder)
    with pytest.raises(ValueError, match="this pipeline's denoiser"):
        pipeline.save_checkpoint([torch.nn.Linear(1, 1)], [], tmp_path)


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipe("red", num_inference_steps=2, generator=generator, output_type="pt").images


def folder_with_text_encoders(model, request, folder):
    """A copy of the model with a LoRA file beside it, of the denoiser and the text encoders, as diffusers writes it."""
    from peft.utils import get_peft_model_state_dict

    pipe = request.getfixturevalue(model)
    layers = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if part in pipe.components:
            targets = ["to_q"] if part == "unet" else ["q_proj", "v_proj"]
            pipe.components[part].add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
            draw_factors(factors_of(pipe.components[part]))
            layers[f"{part}_lora_layers"] = get_peft_model_state_dict(pipe.components[part])
    folder = shutil.copytree(request.getfixturevalue(f"{model}_folder"), folder)
    type(pipe).save_lora_weights(folder, **layers)
    return pipe, folder


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_what_text_encoders_have_takes_part_and_is_saved_again(model, request, tmp_path):
    pipe, folder = folder_with_text_encoders(model, request, tmp_path / "model")
    pipeline = DefaultDDPOStableDiffusionPipeline(folder)
    for module in (pipeline.unet, *pipeline.text_encoders):
        module.to(torch.bfloat16)  # as mixed precision does, which must not round the adapters
    pipeline.get_trainable_layers()
    for module in (pipeline.unet, *pipeline.text_encoders):
        module.to(torch.float32)
    assert not any(p.requires_grad for encoder in pipeline.text_encoders for p in encoder.parameters())
    assert {name.split(".lora_")[1] for name, p in pipeline.unet.named_parameters() if p.requires_grad} == {
        "A.default.weight",
        "B.default.weight",
    }
    save_lora(pipeline.sd_pipeline, tmp_path / "saved")
    saved, given = (load_file(one / "pytorch_lora_weights.safetensors") for one in (tmp_path / "saved", folder))
    assert len(saved) == len(given)
    assert sum(key.startswith("text_encoder") for key in saved) >= 8
    other = type(pipe).from_pretrained(folder, local_files_only=True)
    untrained = images(other)
    other.load_lora_weights(tmp_path / "saved")
    other.scheduler = pipe.scheduler
    torch.testing.assert_close(images(other), images(pipe), rtol=0, atol=1e-5)
    assert (images(other) - untrained).abs().max() > 1e-3


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_a_saved_pipeline_loads_in_diffusers_and_here(model, request, tmp_path):
    """Its folder holds networks without adapters, text encoders too, the settings, and the LoRA file."""
    pipe, folder = folder_with_text_encoders(model, request, tmp_path / "model")
    pipeline = DefaultDDPOStableDiffusionPipeline(folder)
    if model == "tiny_sdxl":
        pipeline.sd_pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    pipeline.get_trainable_layers()
    expected = images(pipeline.sd_pipeline)
    pipeline.save_pretrained(tmp_path / "saved")
    assert torch.equal(images(pipeline.sd_pipeline), expected)
    other = type(pipe).from_pretrained(tmp_path / "saved", local_files_only=True)
    if model == "tiny_sdxl":
        assert other.config.force_zeros_for_empty_prompt is False
    assert not torch.equal(images(other), expected)
    other.load_lora_weights(tmp_path / "saved")
    torch.testing.assert_close(images(other), expected, rtol=0, atol=1e-5)
    again = DefaultDDPOStableDiffusionPipeline(tmp_path / "saved")
    torch.testing.assert_close(images(again.sd_pipeline), expected, rtol=0, atol=1e-5)


def test_a_lora_of_the_text_encoder_alone_beside_the_model(tiny_sd, tiny_sd_folder, tmp_path):
    from peft.utils import get_peft_model_state_dict

    tiny_sd.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    draw_factors(factors_of(tiny_sd.text_encoder))
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "model")
    tiny_sd.save_lora_weights(folder, text_encoder_lora_layers=get_peft_model_state_dict(tiny_sd.text_encoder))
    pipeline = DefaultDDPOStableDiffusionPipeline(folder)
    pipeline.get_trainable_layers()
    pipeline.save_checkpoint([pipeline.unet], [], tmp_path)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {key.split(".")[0] for key in saved} == {"unet", "text_encoder"}
    pipeline.load_checkpoint([pipeline.unet], tmp_path)
    torch.testing.assert_close(images(pipeline.sd_pipeline), images(tiny_sd), rtol=0, atol=1e-5)


def test_the_trained_adapter_can_be_chosen_and_is_said(tiny_sd_folder, tmp_path, caplog):
    pipeline = DefaultDDPOStableDiffusionPipeline(tiny_sd_folder, adapter="reward")
    for name in ("style", "reward"):
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), name)
    pipeline.sd_pipeline.set_adapters(["style", "reward"])
    pipeline.get_trainable_layers()
    assert "'reward' of the unet, rank 2, is trained and saved; neither trained nor saved: 'style'" in caplog.text
    other = DefaultDDPOStableDiffusionPipeline(tiny_sd_folder)
    for name in ("style", "reward"):
        other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), name)
    other.sd_pipeline.set_adapters(["style", "reward"])
    with pytest.raises(ValueError, match=r"'reward', 'style' require grad: choose one, for example adapter='reward'"):
        other.get_trainable_layers()


@pytest.mark.parametrize("where", ["in memory", "in the folder"])
def test_a_loaded_adapter_that_is_trained_is_said_where_nobody_has_asked_for_more(
    tiny_sd, tiny_sd_folder, tmp_path, caplog, where
):
    """At logging's default level and on the command line, info messages are not shown."""
    add_lora(tiny_sd, 3, 3)
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "model")
    save_lora(tiny_sd, folder if where == "in the folder" else tmp_path)
    pipeline = DefaultDDPOStableDiffusionPipeline(folder, adapter="style" if where == "in the folder" else None)
    if where == "in memory":
        pipeline.sd_pipeline.load_lora_weights(tmp_path, adapter_name="style")
    pipeline.get_trainable_layers()
    (line,) = [
        r.getMessage() for r in caplog.records if r.name.startswith("alignprop_fast") and r.levelname == "WARNING"
    ]
    assert line.startswith("training continues from existing adapters: adapter 'style' of the unet, rank 3, is tr")


def test_new_adapters_alone_are_no_warning(tiny_sd_folder, caplog):
    with caplog.at_level("INFO", "alignprop_fast"):
        DefaultDDPOStableDiffusionPipeline(tiny_sd_folder).get_trainable_layers()
    assert [(r.levelname, r.getMessage()) for r in caplog.records if "is trained" in r.getMessage()] == [
        ("INFO", "adapter 'default' of the unet, rank 4, is trained and saved")
    ]


def test_a_new_adapter_gets_the_chosen_name(tiny_sd_folder):
    pipeline = DefaultDDPOStableDiffusionPipeline(tiny_sd_folder, adapter="reward")
    assert list(pipeline.get_trainable_layers().peft_config) == ["reward"]


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_whole_denoiser_with_adapters_is_refused(tiny_sd_folder, part):
    """Nobody could load the denoiser or the pipeline in the form that would be saved."""
    pipeline = DefaultDDPOStableDiffusionPipeline(tiny_sd_folder, use_lora=False)
    targets = ["to_q"] if part == "unet" else ["q_proj"]
    pipeline.sd_pipeline.components[part].add_adapter(LoraConfig(r=2, target_modules=targets))
    with pytest.raises(ValueError, match="pipeline has adapters: train those with use_lora=True"):
        pipeline.get_trainable_layers()
