"""Cost tables of a sampler's training step: a plan's predicted bytes against its step's live tensor bytes.

Measured over budgets, gates and rewards: predictions are 0 to 1 % above, never below. Asserted: 0 to 3 %.
"""

import random
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from alignprop_fast.generate import cost_table
from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.making.random_weights import make_folder
from alignprop_fast.planner import BudgetInfeasible, Solver, find_gpu
from alignprop_fast.rewards import FunctionReward
from alignprop_fast.runtime import LiveBytes
from alignprop_fast.training.flat_parameters import FlatParameters

PROMPTS = ["red cat", "dog and cat"]
STEPS = 6


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """Activations several times the weights, as with the real models."""
    folder = make_folder(
        "sd", tmp_path_factory.mktemp("models") / "sd", unet_widths=(32, 64), latent_size=16, vae_widths=(32, 32, 32)
    )
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).eval()
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    return pipe


def score(images, prompts, metadata):
    return (images.sin() * images.cos() * images).mean((1, 2, 3)), {}


reward = FunctionReward(score, by_image=True)


def step(sampler, plan):
    images = sampler(PROMPTS, generator=torch.Generator().manual_seed(0), plan=plan)
    scores, _ = sampler.score(images, PROMPTS, [{}, {}])
    loss = -scores.mean()
    (loss if sampler.base_mse is None else loss + sampler.base_mse).backward()


def state_bytes(optimizer):
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())


@pytest.mark.slow("trains under eight plans, and counts each operator")
@pytest.mark.parametrize("penalised", [False, True])
def test_predicted_peaks_are_the_real_ones(pipe, penalised, steady_clock):
    sampler = DifferentiableSampler(pipe, STEPS, memory_budget="8GiB", reward=reward, compare_with_base=penalised)
    table = sampler.cost_table(len(PROMPTS))
    solver = Solver(table, STEPS, STEPS)
    with pytest.raises(BudgetInfeasible) as error:
        solver.plan(range(STEPS), 1)
    least, most = error.value.smallest_bytes, solver.plan(range(STEPS), 2**33).peak_bytes
    assert most > 2 * least
    optimizer = torch.optim.AdamW([p for p in pipe.unet.parameters() if p.requires_grad], lr=0.0)
    step(sampler, solver.plan(range(STEPS), least))
    optimizer.step()
    optimizer.zero_grad()
    there_bytes = table.fixed["weights"] + table.fixed["adapters"] + state_bytes(optimizer)
    rng, residents, stages = random.Random(0), set(), set()
    for k in range(2 if penalised else 7):
        budget = least + (most - least) * k // (1 if penalised else 6)
        plan = solver.plan(sorted(rng.sample(range(STEPS), STEPS if k % 2 == 0 else 3)), budget)
        with LiveBytes() as live:
            step(sampler, plan)
        optimizer.zero_grad()
        real_bytes = there_bytes + live.peak_bytes
        # A plan assumes that a replay compares with the base model again, which matters for the leanest plans.
        # The chosen mixture of options depends on measured seconds. A few mixtures take more bytes than the sum over
        # their blocks with one option each: 0.23 % at most of those seen.
        assert 0.997 * real_bytes <= plan.peak_bytes <= (1.12 if penalised else 1.03) * real_bytes, plan.explain()
        assert plan.peak_bytes <= budget
        residents.add(len(plan.resident_steps))
        stages |= {plan.decoder.name, plan.reward.name}
    assert len(residents) >= (2 if penalised else 3) and (penalised or len(stages) > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_counted_as_they_lie_between_micro_batches(tiny_sd, dtype):
    tiny_sd.to(dtype).unet.add_adapter(LoraConfig(r=4, target_modules=["to_k", "to_q"]))
    sampler = DifferentiableSampler(tiny_sd, STEPS)
    parameters = sampler.model.trainable()
    assert {parameter.dtype for parameter in parameters} == {dtype}
    FlatParameters(parameters)
    sampler(["a dog"], grad_steps=[0]).mean().backward()
    taken = sum(parameter.grad.numel() * parameter.grad.element_size() for parameter in parameters)
    counted = cost_table._fixed(sampler._blank_step(1, None))["gradients"]
    assert counted == taken == 4 * sum(map(torch.numel, parameters))


def test_measured_tables_are_remembered_and_measured_again_where_they_are_damaged(pipe, monkeypatch):
    sampler = DifferentiableSampler(pipe, STEPS)
    first = sampler.cost_table(1)
    monkeypatch.setattr(cost_table, "step_costs", None)  # raises if anything is measured again
    assert sampler.cost_table(1) == first
    other = DifferentiableSampler(pipe, STEPS, height=64, width=32)
    with pytest.raises(TypeError):
        other.cost_table(1)
    file = cost_table.cache_file(first.origin)
    file.write_text(file.read_text()[:100])
    with pytest.raises(TypeError):
        sampler.cost_table(1)


def test_a_table_from_which_something_was_left_out_is_not_remembered(pipe, monkeypatch):
    """The next process may have more memory."""

    def too_large(images):
        if len(images) > 1:
            raise torch.AcceleratorError("CUDA error: out of memory", 2)
        return decode(images)

    sampler = DifferentiableSampler(pipe, STEPS, height=24, width=24)
    decode = sampler.model.decode
    monkeypatch.setattr(sampler.model, "decode", too_large)
    assert [stage.name for stage in sampler.cost_table(2).decoders] == ["image", "bands"]
    monkeypatch.setattr(cost_table, "step_costs", None)
    with pytest.raises(TypeError):
        sampler.cost_table(2)


def test_a_table_is_that_of_the_autocast_state_it_was_measured_in(pipe):
    sampler = DifferentiableSampler(pipe, STEPS, height=16, width=16, memory_budget="8GiB")
    plain = sampler.solver(1)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sampler.solver(1)
    assert sampler.solver(1) is plain is not cast
    assert (plain.table.origin["autocast"], cast.table.origin["autocast"]) == ("None", "torch.bfloat16")
    kept = [sum(segment.option("keep").kept_bytes for segment in one.table.step) for one in (plain, cast)]
    assert kept[0] != kept[1]


def test_a_table_is_that_of_how_guidance_is_combined_and_of_the_kernels_allowed(pipe):
    def origin(**options):
        sampler = DifferentiableSampler(pipe, STEPS, 5.0, **options)
        return cost_table.step_origin(sampler._blank_step(1, None))

    plain, rescaled = origin(), origin(guidance_rescale=0.7)
    torch.use_deterministic_algorithms(True)
    try:
        deterministic = origin()
    finally:
        torch.use_deterministic_algorithms(False)
    assert plain == origin() and plain != rescaled and plain != deterministic


def test_measuring_draws_no_random_numbers(pipe):
    def noisy(images, prompts, metadata):
        return (images * torch.rand_like(images)).mean((1, 2, 3)), {}

    sampler = DifferentiableSampler(pipe, STEPS, height=32, width=32, memory_budget="8GiB", reward=noisy)
    state = torch.get_rng_state()
    sampler.plan_for(2)
    assert torch.equal(state, torch.get_rng_state())


def test_estimates_need_neither_weights_nor_the_gpu(tiny_sd):
    """On tensors without data: a faster GPU takes fewer seconds and the same bytes."""
    tiny_sd.unet.add_adapter(LoraConfig(r=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    weight_bytes = sum(
        t.numel() * t.element_size()
        for module in (tiny_sd.unet, tiny_sd.vae, tiny_sd.text_encoder)
        for t in (*module.parameters(), *module.buffers())
    )
    sampler = DifferentiableSampler(tiny_sd.to("meta"), STEPS)
    gpu = find_gpu("RTX 3060")
    crawling = replace(gpu, fp32_flops=1e9, bandwidth=1e9)  # else a tiny model is launch-bound on every GPU
    slow, fast = (sampler.cost_table(1, which) for which in (crawling, gpu))
    assert slow.fixed == fast.fixed and slow.fixed["weights"] + slow.fixed["adapters"] == weight_bytes
    assert slow.sampling_seconds > fast.sampling_seconds > 0
    # A graph saves launches: of 4 us it leaves 1.5 where there is nothing else, and of a slow GPU's time hardly any.
    assert fast.graphs.sampling_ratio == pytest.approx(1.5 / 4, rel=0.05) and 0.5 < slow.graphs.sampling_ratio < 1
    assert [o.kept_bytes for s in slow.step for o in s.options] == [o.kept_bytes for s in fast.step for o in s.options]
    assert {option.name for option in slow.step[1].options} >= {"keep", "recompute", "keep+offload"}
    offloaded = [option for segment in slow.step for option in segment.options if option.name.offload]
    assert all(option.host_bytes for option in offloaded), "an option that moves nothing does not exist"
    plan = Solver(slow, STEPS, STEPS).plan(range(STEPS), gpu.memory_bytes)
    assert plan.peak_bytes < gpu.memory_bytes and "resident" in plan.explain()
