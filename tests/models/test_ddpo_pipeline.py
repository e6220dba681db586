"""The pipeline class of trl's scripts: its attributes, what it trains, what it writes."""

import contextlib
import shutil

import pytest
import torch

from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.models.lora import add_lora, save_lora


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
