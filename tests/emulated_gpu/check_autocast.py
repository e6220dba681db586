"""The plan of a whole UNet that trains under autocast includes the casts of activations and weights."""

import pytest
import torch

from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.ops.garbage import collect_garbage
from alignprop_fast.training.config import AlignPropConfig
from alignprop_fast.training.prepare import make_sampler, prepare_model

pytestmark = pytest.mark.usefixtures("plain_kernels", "steady_clock")

PROMPTS, STEPS = ["a dog"], 2


def reward(images, prompts, metadata):
    return images.mean((1, 2, 3)), {}


@pytest.fixture
def sampler(tiny_sd_folder, emulated):
    pipeline = DefaultDDPOStableDiffusionPipeline(str(tiny_sd_folder), use_lora=False)
    config = AlignPropConfig(mixed_precision="bf16", sample_num_steps=STEPS, memory_budget="8GiB", cache_text=False)
    prepare_model(pipeline, torch.device("cuda"), config)
    return make_sampler(pipeline, config, reward)


def test_the_plan_is_that_of_the_chain_under_autocast(sampler):
    parameters = sampler.model.trainable()
    moments = [torch.zeros(2, *p.shape, device="cuda") for p in parameters]  # what an optimizer holds, planned for
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        collect_garbage()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            images = sampler(PROMPTS, None, torch.Generator().manual_seed(0))
            sampler.score(images, PROMPTS, [{}])[0].mean().backward()
        peak = torch.cuda.max_memory_allocated()
        del images
    assert len(moments) == len(parameters) and sampler.plan.resident_steps
    plan, table = sampler.plan, sampler.solver(len(PROMPTS)).table
    # Blocks differ in size here, so a neighbour of the largest has less in transfer to the host than the plan assumes.
    slack = 0.1 * peak + (table.transfer_bytes if plan.host_bytes else 0)
    # What this check holds itself, the loss and timesteps, a number for each; and what some mixtures of options take
    # more than the sum of their blocks (tests/generate/test_cost_table.py).
    assert 0.997 * peak - 16 * 512 <= plan.peak_bytes <= peak + slack, plan.explain()
