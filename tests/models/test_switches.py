"""Features switched on in a pipeline: exact against autograd through diffusers' own call, or refused."""

import contextlib

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from alignprop_fast import DifferentiableSampler
from alignprop_fast.models import adapt
from alignprop_fast.models.conditioning import PromptBatch

from ..adapters import draw_factors, factors_of
from .switch_cases import CASES, PROJECTED, changed_unet, tiny_vae

FORMATS = [case.format for case in CASES]


def named(*answers):
    return [pytest.param(case, id=case.format.name) for case in CASES if case.format.answer in answers]


@pytest.mark.parametrize("case", named("refused"))
def test_refused_with_the_call_that_undoes_it(case, request):
    pipe = request.getfixturevalue(case.kind)
    case.on(pipe)
    with pytest.raises(ValueError) as error:
        DifferentiableSampler(pipe, 2, height=16, width=16)
    assert case.format.words in str(error.value) and "\n" not in str(error.value)
    assert not any(type(module).__module__.startswith("alignprop_fast") for module in pipe.vae.modules())  # untouched
    if case.off is not None:
        case.off(pipe)
        adapt(pipe)


def add_adapters(pipe):
    denoiser = pipe.unet if "unet" in pipe.components else pipe.transformer
    denoiser.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"]))
    draw_factors(factors_of(denoiser))
    return {name: one for name, one in denoiser.named_parameters() if one.requires_grad}


def gradients(images, parameters):
    for parameter in parameters.values():
        parameter.grad = None
    ramp = torch.linspace(-1, 2, images[0].numel()).reshape(images[0].shape)
    (images * ramp).sin().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


PROMPTS, SETTINGS = ["a <red> cat", "dog"], {"num_inference_steps": 2, "guidance_scale": 5.0}


def diffusers_images(pipe, **settings):
    """The gradients of the pipeline's own call with autograd on, which its decorator switches off."""
    call = type(pipe).__call__
    while hasattr(call, "__wrapped__"):
        call = call.__wrapped__
    settings = {**SETTINGS, "generator": torch.Generator().manual_seed(5), "output_type": "pt", **settings}
    return call(pipe, PROMPTS, **settings).images


def our_images(pipe, **size):
    sampler = DifferentiableSampler(pipe, *SETTINGS.values(), 0.0, **size)
    return sampler(PROMPTS, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("case", named("read exactly"))
def test_exact_against_autograd_through_diffusers(case, request):
    """Within 1e-4 of the largest gradient, which covers fp32 rounding through a chain of two steps."""
    pipe = request.getfixturevalue(case.kind)
    case.on(pipe)
    size = {"height": 16, "width": 16}
    parameters = add_adapters(pipe)
    theirs = diffusers_images(pipe, **size)
    theirs_grads = gradients(theirs, parameters)
    ours = our_images(pipe, **size)
    assert (ours - theirs).abs().max() < 1e-5
    for name, grad in gradients(ours, parameters).items():
        assert theirs_grads[name].abs().max() > 0
        assert (grad - theirs_grads[name]).abs().max() <= 1e-4 * theirs_grads[name].abs().max(), name


@pytest.mark.parametrize("sample_size", [[8, 16], None])
def test_the_size_of_the_models_configuration(tiny_sd, sample_size):
    changed_unet(sample_size=sample_size)(tiny_sd)
    pipe = StableDiffusionPipeline(**tiny_sd.components, requires_safety_checker=False)  # looks at it when it is made
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        if sample_size is None:
            with pytest.raises(ValueError, match="has no sample_size: give height and width"):
                our_images(pipe)
        size = {"height": 16, "width": 32} if sample_size is None else {}
        ours, theirs = our_images(pipe, **size), diffusers_images(pipe, **size)
    assert ours.shape == (2, 3, 16, 32) and (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("tiny_sd", "text_encoder"),
        ("tiny_sdxl", "text_encoder"),
        ("tiny_sd3", "text_encoder_2"),
        ("tiny_flux", "tokenizer_2"),
    ],
)
def test_prompts_without_what_encodes_them(kind, part, request):
    pipe = request.getfixturevalue(kind)
    pipe.register_modules(**{part: None})
    with pytest.raises(ValueError, match=f"the pipeline has no {part}, which encodes prompts"):
        our_images(pipe, height=16, width=16)


def test_a_text_encoder_on_another_device(tiny_sd):
    tiny_sd.text_encoder.to("meta")
    with pytest.raises(ValueError, match=r"pipe.text_encoder is on meta, the denoiser on cpu: use pipe.to\('cpu'\)"):
        our_images(tiny_sd)


def test_text_encoders_of_another_dtype(tiny_sd):
    """diffusers itself stops there; here the embeddings are used as given, in the denoiser's dtype."""
    tiny_sd.text_encoder.to(torch.bfloat16)
    with contextlib.suppress(RuntimeError):
        diffusers_images(tiny_sd)
        raise AssertionError("diffusers reads it now: compare")
    cond, uncond = tiny_sd.encode_prompt(PROMPTS, "cpu", 1, True)
    pipe = StableDiffusionPipeline(**{**tiny_sd.components, "text_encoder": None}, requires_safety_checker=False)
    embeds = {"prompt_embeds": cond.float(), "negative_prompt_embeds": uncond.float()}
    call = StableDiffusionPipeline.__call__.__wrapped__
    with torch.no_grad():
        settings = {**SETTINGS, "generator": torch.Generator().manual_seed(5), "output_type": "pt"}
        theirs = call(pipe, None, **settings, **embeds).images
        assert (our_images(tiny_sd) - theirs).abs().max() < 1e-5


def test_what_a_memory_budget_asks_of_a_tiny_vae_and_of_projected_text(tiny_sd):
    tiny_vae(tiny_sd)
    PROJECTED(tiny_sd)
    model = adapt(tiny_sd)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.decode_by_bands(x), model.decode(x)) and not model.decoder_groups()["decoder"]
    blank = model.blank_conditioning(2, True, (16, 16))
    cond = model.encode(PromptBatch(PROMPTS, None, True, (16, 16)))
    assert blank.embeds.shape == cond.embeds.shape


def test_a_pipeline_that_draws_in_a_way_of_its_own(tiny_sd):
    class Mine(StableDiffusionPipeline):
        def __call__(self, prompt):
            return None

    with pytest.raises(ValueError, match=r"Mine draws in its own way: use StableDiffusionPipeline\(\*\*pipe\."):
        adapt(Mine(**tiny_sd.components, requires_safety_checker=False))
