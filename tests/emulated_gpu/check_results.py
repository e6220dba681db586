"""Images and gradients of a chain on the emulated GPU equal those on the CPU, for every architecture; no step waits."""

from copy import deepcopy

import pytest
import torch

from alignprop_fast import DifferentiableSampler
from alignprop_fast.planner import BudgetInfeasible
from alignprop_fast.runtime import run_chain

pytestmark = pytest.mark.usefixtures("plain_kernels", "steady_clock")

STEPS, PROMPTS = 4, ["a red cat", "a dog" * 12]  # of different lengths for Z-Image and Qwen-Image
UNSIZED = (
    "FluxPipeline",
    "ChromaPipeline",
    "ZImagePipeline",
    "Flux2KleinPipeline",
    "Flux2Pipeline",
    "QwenImagePipeline",
    "Krea2Pipeline",
    "Lumina2Pipeline",
    "SanaPipeline",
)  # whose default pictures are large for every model


@pytest.fixture
def pipes(adapted):
    """The same pipeline on the CPU and on the GPU."""
    return adapted, deepcopy(adapted).to("cuda")


def is_measured_as_klein(pipe):
    """Whether the blocks are klein's. To measure them again would take half a minute."""
    return type(pipe).__name__ == "Flux2Pipeline"


def run(pipe, budget):
    size = {"height": 16, "width": 16} if type(pipe).__name__ in UNSIZED else {}
    sampler = DifferentiableSampler(pipe, STEPS, memory_budget=budget, **size)
    images = sampler(PROMPTS, None, torch.Generator().manual_seed(3), grad_steps=[1, 3])
    (images * torch.linspace(0, 1, 16, device=images.device)).mean().backward()
    trained = sampler.model.trainable()
    grads = [p.grad for p in trained]
    assert all(g is not None and g.device == images.device for g in grads)
    for parameter in trained:
        parameter.grad = None
    return images.detach().cpu(), torch.cat([g.flatten() for g in grads]).cpu(), sampler.plan


def test_images_and_gradients_are_those_of_the_cpu(pipes):
    """With a budget that keeps everything, one that runs everything again, and no budget."""
    on_cpu, on_gpu = pipes
    images, grads, _ = run(on_cpu, None)
    budgets: list = [None]
    if not is_measured_as_klein(on_gpu):
        with pytest.raises(BudgetInfeasible) as error:
            run(on_gpu, 1)
        budgets += ["10GiB", error.value.smallest_bytes]
    for budget in budgets:
        ours, our_grads, plan = run(on_gpu, budget)
        # fp32 on both; attention and norms sum in another order.
        assert (images - ours).abs().max() <= 1e-5, budget
        assert (grads - our_grads).abs().max() <= 1e-4 * grads.abs().max(), budget
        assert budget is None or plan.peak_bytes <= 10 * 2**30


def test_no_step_waits_for_the_device(pipes, emulated):
    _, on_gpu = pipes
    if is_measured_as_klein(on_gpu):
        pytest.skip("measuring takes half a minute")
    size = {"height": 16, "width": 16} if type(on_gpu).__name__ in UNSIZED else {}
    sampler = DifferentiableSampler(on_gpu, STEPS, **size)
    cond = sampler.model.blank_conditioning(2, type(on_gpu).__name__ != "FluxPipeline", sampler.size)
    chain = sampler._chain(cond, None, sampler.table)
    x = sampler.model.initial_latents(2, sampler.size, None, None)
    before = emulated.waits()
    assert x.sum().item() is not None and emulated.waits() == before + 1, "the device sees who waits"
    plan = sampler.plan_for(2)
    before = emulated.waits()
    out = run_chain(chain, plan, x)
    out.sum().backward()
    # The noise of each step is drawn on the host, as diffusers draws it, and copied.
    drawn = STEPS if sampler.draw_noise else 0
    assert emulated.waits() - before <= drawn
