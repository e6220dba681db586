"""The sampler under plans: the same bits under each of them, and a budget that chooses one."""

import random

import pytest
import torch

from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.planner import GRADES, BlockOption, BudgetInfeasible, Plan
from alignprop_fast.runtime import HostPool, Offloader, PeakMeter

from .plain_autograd import PROMPTS, add_adapters, assert_equal_gradients, gradients, reward
from .plans import DECODERS, STEPS, make_plan


@pytest.fixture(params=["tiny_sd", "tiny_sdxl"])
def pipe(request):
    return add_adapters(request.getfixturevalue(request.param))


def test_every_plan_gives_the_same_bits(pipe):
    results = []
    for kind in DECODERS:
        sampler = DifferentiableSampler(pipe, STEPS)
        images = sampler(PROMPTS, None, torch.Generator().manual_seed(5), plan=make_plan(kind, (1, 2, 3)))
        results.append((images.detach(), gradients(pipe, images)))
    for images, grads in results[1:]:
        assert (images - results[0][0]).abs().max() < 1e-5
        assert_equal_gradients(grads, results[0][1])


@pytest.mark.parametrize("option", [option for option in GRADES if option != "keep"])
def test_every_option_of_a_step_gives_the_same_bits(pipe, option):
    sampler = DifferentiableSampler(pipe, STEPS)
    results = []
    for name in (BlockOption.KEEP, option):
        options = {"*": name}
        plan = Plan(STEPS, (2, 3), (1,), (options, options), options)
        results.append(gradients(pipe, sampler(PROMPTS, None, torch.Generator().manual_seed(5), plan=plan)))
    assert all(torch.equal(grad, results[0][name]) for name, grad in results[1].items())


def test_mixtures_of_options_by_block_give_the_same_bits(pipe, monkeypatch):
    """Every block of every step gets its own option, offloaded or not."""
    sampler, rng = DifferentiableSampler(pipe, STEPS), random.Random(0)
    device = torch.device("cpu")
    monkeypatch.setattr(
        sampler.renderer, "_offloader", lambda plan: Offloader(device, HostPool(device), smallest_bytes=1)
    )

    def mixture():
        names = [*BlockOption]
        return {block.name: rng.choice(names) for block in sampler.denoiser_blocks}

    plain = Plan(STEPS, (2, 3), (1,), ({}, {}), {})
    expected = gradients(pipe, sampler(PROMPTS, None, torch.Generator().manual_seed(5), plan=plain))
    for _ in range(3):
        plan = Plan(STEPS, (2, 3), (1,), (mixture(), mixture()), mixture())
        grads = gradients(pipe, sampler(PROMPTS, None, torch.Generator().manual_seed(5), plan=plan))
        assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())


def test_budget_decides_what_is_resident(tiny_sd):
    add_adapters(tiny_sd)
    sampler = DifferentiableSampler(tiny_sd, STEPS, memory_budget="8GiB")
    sampler(PROMPTS)
    fastest = sampler.plan
    with pytest.raises(BudgetInfeasible) as error:
        DifferentiableSampler(tiny_sd, STEPS, memory_budget="1MiB")(PROMPTS)
    smallest = error.value.smallest_bytes
    lean = DifferentiableSampler(tiny_sd, STEPS, memory_budget=int(smallest * 1.02))
    lean(PROMPTS)
    assert fastest.peak_bytes > lean.plan.peak_bytes
    assert len(fastest.resident_steps) > len(lean.plan.resident_steps)
    assert "resident" in lean.plan.explain()


def test_budget_error_comes_before_any_random_number_is_drawn(tiny_sd):
    add_adapters(tiny_sd)
    sampler = DifferentiableSampler(tiny_sd, STEPS, memory_budget="1MiB")
    state = torch.get_rng_state()
    with pytest.raises(BudgetInfeasible, match="raise the budget"):
        sampler(PROMPTS)
    assert torch.equal(state, torch.get_rng_state())


def test_memory_is_that_of_one_step_whatever_the_length(tiny_sd):
    """Replayed: from 3 to 12 gradient steps the peak grows at most by the kept latents."""
    add_adapters(tiny_sd)
    peaks = []
    for steps in (3, 12):
        sampler = DifferentiableSampler(tiny_sd, steps)
        with PeakMeter(torch.device("cpu")) as meter:
            reward(sampler(PROMPTS)).backward()
        peaks.append(meter.peak_bytes)
        tiny_sd.unet.zero_grad()
    latent_bytes = 2 * 4 * 8 * 8 * 4
    assert peaks[0] <= peaks[1] <= peaks[0] + 2 * 9 * latent_bytes
