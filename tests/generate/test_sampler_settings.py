"""The sampler's settings and what it refuses, and what it leaves as it was."""

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict

from alignprop_fast.generate.sampler import DifferentiableSampler

from .plain_autograd import PROMPTS, add_adapters, reward

STEPS = 4


def test_unused_noise_is_drawn_on_request(tiny_sd):
    """trl draws step noise also at eta = 0: the images are the same, the random state is not."""
    states, images = [], []
    for draw in (False, True):
        generator = torch.Generator().manual_seed(1)
        images.append(DifferentiableSampler(tiny_sd, STEPS, eta=0.0, draw_unused_noise=draw)(PROMPTS, None, generator))
        states.append(generator.get_state())
    assert torch.equal(*images) and not torch.equal(*states)


def test_adapters_stay_ordinary_peft_parameters(tiny_sd, tmp_path):
    add_adapters(tiny_sd)
    before = {name: value.clone() for name, value in tiny_sd.unet.state_dict().items()}
    reward(DifferentiableSampler(tiny_sd, STEPS)(PROMPTS)).backward()
    after = tiny_sd.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(tiny_sd.unet))
    tiny_sd.save_lora_weights(tmp_path, unet_lora_layers=lora)
    tiny_sd.unload_lora_weights()
    tiny_sd.load_lora_weights(tmp_path)
    reloaded = tiny_sd.unet.state_dict()
    assert all(torch.equal(before[n], reloaded[n.replace("default", "default_0")]) for n in before if "lora_A" in n)


def test_two_ways_to_name_the_gradient_steps_are_refused(tiny_sd):
    with pytest.raises(ValueError, match="give one of them"):
        DifferentiableSampler(tiny_sd, STEPS)(PROMPTS, grad_steps=(1,), truncation="full")


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"eta": 2.0}, "eta"),
        ({}, {"num_inference_steps": 0}, "inference steps"),
        ({}, {"height": 13}, "multiple of 8"),
        ({}, {"memory_budget": "much"}, "24GiB"),
        ({"clip_sample": True}, {}, "clip_sample=False"),
    ],
)
def test_bad_settings_are_refused_with_a_remedy(tiny_sd, change, arguments, message):
    tiny_sd.scheduler = DDIMScheduler.from_config({**tiny_sd.scheduler.config, **change})
    with pytest.raises(ValueError, match=message):
        DifferentiableSampler(tiny_sd, **arguments)


def test_other_schedulers_and_pipelines_are_refused(tiny_sd):
    with pytest.raises(ValueError, match="StableDiffusionPipeline"):
        DifferentiableSampler(tiny_sd.unet)
    tiny_sd.scheduler = PNDMScheduler.from_config(tiny_sd.scheduler.config)
    with pytest.raises(ValueError, match=r"DDIMScheduler\.from_config"):
        DifferentiableSampler(tiny_sd)


def test_second_backward_is_refused(tiny_sd):
    add_adapters(tiny_sd)
    loss = reward(DifferentiableSampler(tiny_sd, STEPS)(PROMPTS))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="sample again"):
        loss.backward()
