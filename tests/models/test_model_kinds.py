"""Kinds of models that people use (fine-tunes for v, few steps, no T5), and those that are refused by name.

What works draws the pictures of diffusers' own pipeline with the model's own scheduler. Tolerance 1e-5 as in
tests/generate/plain_autograd.py; at zero terminal SNR 1e-4, since diffusers' Euler starts from latents of 4096 there,
in fp32.
"""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.making.random_weights import make_folder
from alignprop_fast.models import adapt
from alignprop_fast.models.conditioning import PromptBatch
from alignprop_fast.models.load.pipeline import load_outline, load_pipeline

SIZE = {"height": 16, "width": 16}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture
def edited(request, tmp_path):
    """edited(kind, settings of the scheduler, index=, unet=) -> a copy of the small folder, changed so."""

    def make(kind, scheduler=None, index=None, unet=None):
        folder = shutil.copytree(request.getfixturevalue(f"tiny_{kind}_folder"), tmp_path / "model")
        if scheduler:
            update(folder / "scheduler" / "scheduler_config.json", scheduler)
            if name := scheduler.get("_class_name"):
                update(folder / "model_index.json", {"scheduler": ["diffusers", name]})
        update(folder / "model_index.json", index or {})
        if unet:
            config = json.loads((folder / "unet" / "config.json").read_text())
            torch.manual_seed(0)
            UNet2DConditionModel.from_config({**config, **unet}).save_pretrained(folder / "unet")
        return folder

    return make


def update(file, changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def ours(folder, steps, scale, scheduler="auto", eta=0.0):
    pipe = load_pipeline(folder, scheduler=scheduler)
    sampler = DifferentiableSampler(pipe, steps, scale, eta, **SIZE)
    with torch.no_grad():
        return sampler("red cat", generator=torch.Generator().manual_seed(0))


def theirs(folder, steps, scale, eta=None, **parts):
    """With the model's own scheduler."""
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": steps, "guidance_scale": scale, **({} if eta is None else {"eta": eta})}
    generator = torch.Generator().manual_seed(0)
    return pipe("red cat", **arguments, **SIZE, generator=generator, output_type="pt").images


def assert_equal(mine, other, tolerance=1e-5):
    assert other.std() > 0.05
    assert (mine - other).abs().max() < tolerance


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize(("name", "class_name"), [("ddim", "DDIMScheduler"), ("euler", "EulerDiscreteScheduler")])
def test_v_prediction_at_zero_terminal_snr(edited, kind, name, class_name):
    folder = edited(kind, {"_class_name": class_name, **ZERO_SNR})
    assert_equal(ours(folder, 4, 5.0, name), theirs(folder, 4, 5.0, eta=0.0), 1e-4)


def test_stable_diffusion_2_1(edited):
    """v, linear projections, and attention upcast as its configuration asks."""
    folder = edited("sd", {"prediction_type": "v_prediction"}, unet={"use_linear_projection": True})
    update(folder / "unet" / "config.json", {"upcast_attention": True})
    assert_equal(ours(folder, 4, 5.0, eta=1.0), theirs(folder, 4, 5.0, eta=1.0))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    ("name", "class_name", "scale"),
    [
        ("euler-ancestral", "EulerAncestralDiscreteScheduler", 0.0),  # Turbo
        ("euler", "EulerDiscreteScheduler", 1.0),  # Lightning
    ],
)
def test_few_steps_without_guidance(edited, name, class_name, scale, steps):
    folder = edited("sdxl", {"_class_name": class_name, "timestep_spacing": "trailing"})
    assert_equal(ours(folder, steps, scale, name), theirs(folder, steps, scale))


def test_schnell(tmp_path):
    folder = make_folder("flux", tmp_path / "schnell", guidance_embeds=False)
    assert_equal(ours(folder, 4, 5.0), theirs(folder, 4, 0.0))


def test_sd3_without_t5(tiny_sd3_folder, tmp_path):
    dropped = {"text_encoder_3": None, "tokenizer_3": None}
    DiffusionPipeline.from_pretrained(tiny_sd3_folder, **dropped).save_pretrained(tmp_path / "model")
    assert_equal(ours(tmp_path / "model", 4, 5.0), theirs(tmp_path / "model", 4, 5.0, **dropped))
    for pipe in (load_pipeline(tmp_path / "model"), load_outline(tmp_path / "model", torch.float32)):
        model = adapt(pipe)
        blank = model.blank_conditioning(2, True, (16, 16))
        if pipe.tokenizer is not None:
            real = model.encode(PromptBatch(["red cat", "dog"], None, True, (16, 16)))
            assert blank.embeds.shape == real.embeds.shape


@pytest.mark.parametrize(
    ("kind", "name", "what"),
    [
        ("sd", "StableDiffusionInpaintPipeline", "a picture beside the prompt"),
        ("sdxl", "StableDiffusionXLInpaintPipeline", "a picture beside the prompt"),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline", "refiner"),
        ("sd", "LatentConsistencyModelPipeline", "LCM"),
        *(("flux", f"Flux{one}Pipeline", "a picture beside the prompt") for one in ("Fill", "Kontext", "Control")),
    ],
)
@pytest.mark.parametrize("load", [load_pipeline, load_outline])
def test_pipelines_for_other_things(edited, load, kind, name, what):
    folder = edited(kind, index={"_class_name": name})
    with pytest.raises(ValueError, match=rf"holds a {name}, which .*{what}.*: use the text-to-image model") as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_pipeline, load_outline])
def test_an_inpainting_unet_under_the_name_of_a_text_to_image_pipeline(edited, load):
    folder = edited("sd", unet={"in_channels": 9})
    with pytest.raises(ValueError, match=r"takes 9 channels and not 4: .*use the text-to-image model"):
        adapt(load(folder))


@pytest.mark.parametrize(("kind", "channels"), [("flux", 384), ("sd3", 33)])
def test_a_transformer_that_sees_a_picture(request, kind, channels):
    pipe = request.getfixturevalue(f"tiny_{kind}")
    pipe.transformer.register_to_config(in_channels=channels)  # Fill, and an inpainting SD3
    with pytest.raises(ValueError, match=f"takes {channels} channels and not {64 if kind == 'flux' else 16}"):
        adapt(pipe)


def test_the_refiner_under_the_name_of_a_text_to_image_pipeline(edited):
    """It takes five numbers beside the text; the last is an aesthetic score."""
    folder = edited("sdxl", unet={"projection_class_embeddings_input_dim": 32 + 5 * 8})
    with pytest.raises(ValueError, match=r"like SDXL's refiner, .*use SDXL's base model"):
        adapt(load_pipeline(folder))


@pytest.mark.parametrize("scheduler", ["auto", "euler"])
@pytest.mark.parametrize("name", ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"])
def test_playground_2_5(edited, name, scheduler):
    folder = edited("sdxl", {"_class_name": name, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5})
    with pytest.raises(ValueError, match=r"EDM noise .*Playground v2.5.*use SDXL"):
        load_pipeline(folder, scheduler=scheduler)


def test_edm_noise_under_another_scheduler(edited):
    """Its settings stay in the config if a user puts in a supported scheduler by hand."""
    import diffusers

    folder = edited("sdxl", {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5})
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EDM noise"):
        DifferentiableSampler(pipe, 4)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("sdxl", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0}, "is for flow matching"),
        ("sdxl", {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "is for flow matching"),
        ("sd3", {"_class_name": "EulerDiscreteScheduler"}, "is for diffusion"),
    ],
)
def test_noise_of_another_family(edited, kind, settings, message):
    with pytest.raises(ValueError, match=rf"{settings['_class_name']}, {message}"):
        load_pipeline(edited(kind, settings))


def test_an_sdxl_of_two_text_encoders_of_their_own_widths(tmp_path):
    folder = make_folder("sdxl", tmp_path / "sdxl", second_text_width=32)
    assert_equal(ours(folder, 3, 5.0, eta=1.0), theirs(folder, 3, 5.0, eta=1.0))


def test_qwen_image_with_padding_before_text(tiny_qwen_image):
    given = {"prompt_embeds": torch.zeros(1, 3, 32), "prompt_embeds_mask": torch.tensor([[0, 1, 1]])}
    with pytest.raises(ValueError, match="prompt_embeds_mask has padding before text: put all padding at the end"):
        adapt(tiny_qwen_image).encode(PromptBatch(["red"], None, False, (16, 16), given))


def test_z_image_in_fp16(tiny_z_image):
    tiny_z_image.transformer.half()
    with pytest.raises(ValueError, match="Z-Image overflows in fp16: use bf16"):
        adapt(tiny_z_image)
