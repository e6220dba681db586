"""The sampler against diffusers' own pipeline (images) and against plain autograd (gradients), in fp32."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from peft import LoraConfig

from alignprop_fast.generate.sampler import DifferentiableSampler, Gate, Truncation
from alignprop_fast.models.lean.surgery import take_ops_out
from alignprop_fast.models.schedules import make_scheduler

from .plain_autograd import PROMPTS, add_adapters, assert_equal_gradients, gradients, reward
from .plans import STEPS, make_plan


@pytest.fixture(params=["tiny_sd", "tiny_sdxl"])
def pipe(request):
    return add_adapters(request.getfixturevalue(request.param))


@torch.no_grad()
def texts_of(pipe, negative):
    """The UNet's embeddings, without the prompts and with them, and SDXL's added conditions."""
    if not hasattr(pipe, "text_encoder_2"):
        cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True, negative)
        return torch.cat([uncond, cond]), None
    cond, uncond, pooled, neg_pooled = pipe.encode_prompt(PROMPTS, negative_prompt=negative)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    ids = torch.tensor([[side, side, 0, 0, side, side]] * 4, dtype=cond.dtype)
    return torch.cat([uncond, cond]), {"text_embeds": torch.cat([neg_pooled, pooled]), "time_ids": ids}


def plain_chain(
    pipe, grad_steps, scale, eta, rescale=0.0, negative=None, latents=None, stop_input=False, last=None, again=0
):
    """Images of the same chain, written with diffusers' scheduler and plain autograd.

    stop_input: no gradient passes through the network's input. last: the step at which the chain ends by predicting x0.
    again: also return the images of this many noisings of the final latents, denoised by the last step (in a list,
    after the chain's).
    """
    texts, added = texts_of(pipe, negative)
    generator = torch.Generator().manual_seed(5)
    size = pipe.unet.config.sample_size
    x = latents if latents is not None else torch.randn(2, 4, size, size, generator=generator)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)

    def predict(x, t):
        y = pipe.unet(torch.cat([x, x]), t, texts, added_cond_kwargs=added).sample
        y_uncond, y_cond = y.chunk(2)
        y = y_uncond + scale * (y_cond - y_uncond)
        return rescale_noise_cfg(y, y_cond, rescale) if rescale else y

    def decode(x):
        return (pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    for i, t in enumerate(scheduler.timesteps if last is None else scheduler.timesteps[: last + 1]):
        y = predict(x.detach() if stop_input else x, t)
        y = y if i in grad_steps else y.detach()
        step = scheduler.step(y, t, x, eta=eta, generator=generator)
        x = step.pred_original_sample if i == last else step.prev_sample
    if not again:
        return decode(x)
    images, t = [decode(x)], scheduler.timesteps[-1]
    for _ in range(again):
        noised = scheduler.add_noise(x.detach(), torch.randn(x.shape, generator=generator), t)
        images.append(decode(scheduler.step(predict(noised, t), t, noised).pred_original_sample))
    return images


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_images_equal_diffusers(pipe, eta, scale):
    for negative in (None, "dog"):
        sampler = DifferentiableSampler(pipe, STEPS, guidance_scale=scale, eta=eta)
        ours = sampler(PROMPTS, negative, torch.Generator().manual_seed(1))
        theirs = pipe(
            PROMPTS,
            negative_prompt=None if negative is None else [negative] * 2,
            num_inference_steps=STEPS,
            guidance_scale=scale,
            eta=eta,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
        ).images
        assert theirs.std() > 0.01
        assert (ours - theirs).abs().max() < 1e-5


# Each value of each setting, and each plan, with every other kind of value at least once, for SD and SDXL.
@pytest.mark.parametrize(
    ("grad_steps", "kind", "eta", "scale", "rescale"),
    [
        ((0, 1, 2, 3), "resident", 1.0, 5.0, 0.0),
        ((0, 1, 2, 3), "replayed", 0.0, 5.0, 0.0),
        ((0, 1, 2, 3), "mixed", 0.5, 2.0, 0.0),
        ((1, 3), "replayed", 0.5, 7.5, 0.7),
        ((0, 2), "mixed", 1.0, 7.5, 0.0),
        ((0, 2), "resident", 0.0, 2.0, 0.7),
        ((3,), "replayed", 1.0, 2.0, 0.0),
        ((3,), "resident", 0.5, 5.0, 0.0),
        ((1, 2, 3), "mixed", 0.0, 1.5, 0.7),
    ],
)
def test_gradients_equal_plain_autograd(pipe, grad_steps, kind, eta, scale, rescale):
    theirs_images = plain_chain(pipe, grad_steps, scale, eta, rescale, negative=["dog", "cat"])
    theirs = gradients(pipe, theirs_images)
    sampler = DifferentiableSampler(pipe, STEPS, scale, eta, guidance_rescale=rescale)
    generator = torch.Generator().manual_seed(5)
    images = sampler(PROMPTS, ["dog", "cat"], generator, plan=make_plan(kind, grad_steps))
    assert (images - theirs_images).abs().max() < 1e-5
    assert_equal_gradients(gradients(pipe, images), theirs)


@pytest.mark.parametrize("kind", ["resident", "replayed", "mixed"])
@pytest.mark.parametrize(
    ("truncation", "eta"),
    [
        (Truncation((Gate(1, input_scale=0.0), Gate(3, input_scale=0.0))), 0.5),
        (Truncation((Gate(0, input_scale=0.0), Gate(2, input_scale=0.0)), last_step=2), 1.0),  # like drtune
        (Truncation((Gate(0, input_scale=0.0), Gate(1, input_scale=0.0)), last_step=2), 0.0),  # the last is closed
        (Truncation.at((3,), last_step=3), 0.0),  # like refl
        (Truncation.at((2,), last_step=2), 1.0),
    ],
)
def test_gradients_of_other_truncations_equal_plain_autograd(tiny_sd, kind, truncation, eta):
    add_adapters(tiny_sd)
    last = truncation.last_step
    plain = plain_chain(
        tiny_sd, truncation.grad_steps, 5.0, eta, stop_input=truncation.gates[0].input_scale == 0, last=last
    )
    theirs = gradients(tiny_sd, plain)
    sampler = DifferentiableSampler(tiny_sd, STEPS, 5.0, eta)
    plan = replace(make_plan(kind, truncation.grad_steps), num_steps=STEPS if last is None else last + 1)
    generator = torch.Generator().manual_seed(5)
    images = sampler(PROMPTS, None, generator, plan=plan, truncation=truncation)
    assert (images - plain).abs().max() < 1e-5
    assert_equal_gradients(gradients(tiny_sd, images), theirs)


def test_renoised_pictures_equal_plain_autograd(tiny_sd):
    """DRaFT-LV: the pictures of the chain and of each noising, and the mean of all their gradients."""
    add_adapters(tiny_sd)
    plain = plain_chain(tiny_sd, (3,), 5.0, 0.0, again=2)
    theirs = gradients(tiny_sd, torch.stack(plain).flatten(0, 1))
    sampler, generator = DifferentiableSampler(tiny_sd, STEPS, 5.0, 0.0), torch.Generator().manual_seed(5)
    images = [sampler(PROMPTS, None, generator, truncation="lv:2")]
    assert sampler.truncation.renoise_steps == (3, 3)
    latents = sampler.latents
    images += [sampler.renoise(latents, PROMPTS, None, generator) for _ in range(2)]
    assert all((ours - theirs).abs().max() < 1e-5 for ours, theirs in zip(images, plain, strict=True))
    assert_equal_gradients(gradients(tiny_sd, torch.stack(images).flatten(0, 1)), theirs)


@pytest.mark.parametrize("stock", [False, True], ids=["ops in", "ops out"])
@pytest.mark.parametrize("kind", ["resident", "replayed", "mixed"])
def test_distance_to_the_base_model_equals_plain_autograd(tiny_sd, kind, stock):
    """Value and gradient of reward plus regulariser; the reference never switches adapters off."""
    base = copy.deepcopy(tiny_sd.unet)
    add_adapters(tiny_sd)
    sampler = DifferentiableSampler(tiny_sd, STEPS, 5.0, 0.5, compare_with_base=True)
    if stock:
        take_ops_out(tiny_sd.unet)
    inputs = []
    hook = tiny_sd.unet.register_forward_hook(
        lambda unet, args, kwargs, out: inputs.append((args, kwargs, out)), with_kwargs=True
    )
    plain = plain_chain(tiny_sd, (1, 3), 5.0, 0.5)
    distances = []
    for i in (1, 3):
        (x, t, embeds), kwargs, _ = inputs[i]
        ours = tiny_sd.unet(x.detach(), t, embeds, **kwargs).sample
        uncond, cond = (ours - base(x.detach(), t, embeds, **kwargs).sample).chunk(2)
        distances.append((uncond + 5.0 * (cond - uncond)).square().mean())
    hook.remove()
    expected = sum(distances) / 2
    theirs = gradients(tiny_sd, plain, 1000 * expected)
    images = sampler(PROMPTS, None, torch.Generator().manual_seed(5), plan=make_plan(kind, (1, 3)))
    assert expected > 1e-4 and sampler.base_mse.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_equal_gradients(gradients(tiny_sd, images, 1000 * sampler.base_mse), theirs)
    assert all(parameter.requires_grad for parameter in sampler.model.trainable())
    tiny_sd.unet.zero_grad()


def test_adapters_that_change_nothing_are_no_distance_away(tiny_sd):
    tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    sampler = DifferentiableSampler(tiny_sd, STEPS, compare_with_base=True)
    sampler(PROMPTS)
    assert sampler.base_mse.item() == 0
    with torch.no_grad():
        sampler(PROMPTS)
    assert sampler.base_mse.item() == 0 and not sampler.base_mse.requires_grad


def test_a_comparison_with_the_base_model_needs_adapters(tiny_sd):
    with pytest.raises(ValueError, match="add a LoRA"):
        DifferentiableSampler(tiny_sd, STEPS, compare_with_base=True)


@pytest.mark.parametrize("scheduler", ["euler", "dpm++2m"])
def test_the_last_step_of_other_schedulers_predicts_the_clean_latents(tiny_sd, scheduler):
    """Their chains end at noise level zero, so ending with the last step's clean latents changes nothing."""
    add_adapters(tiny_sd)
    tiny_sd.scheduler = make_scheduler(scheduler, tiny_sd.scheduler.config)
    sampler, results = DifferentiableSampler(tiny_sd, STEPS), []
    for last in (None, STEPS - 1):
        truncation = Truncation.at((1, 3), last_step=last)
        images = sampler(PROMPTS, None, torch.Generator().manual_seed(5), truncation=truncation)
        results.append((images.detach(), gradients(tiny_sd, images)))
    assert (results[0][0] - results[1][0]).abs().max() < 1e-5
    assert_equal_gradients(results[1][1], results[0][1])
    again = sampler.renoise(sampler.latents, PROMPTS, None, torch.Generator().manual_seed(6))
    assert 1e-4 < (again - results[1][0]).abs().mean() < 0.2 and gradients(tiny_sd, again)


def test_gradient_of_the_initial_latents(tiny_sd):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    add_adapters(tiny_sd)
    grads = []
    for run in (
        lambda x: DifferentiableSampler(tiny_sd, STEPS, eta=0.0)(PROMPTS, latents=x, grad_steps=(1, 2)),
        lambda x: plain_chain(tiny_sd, (1, 2), 5.0, 0.0, latents=x),
    ):
        x = latents.clone().requires_grad_()
        grads.append(torch.autograd.grad(reward(run(x)), x)[0])
    assert (grads[0] - grads[1]).abs().max() < 1e-4 * grads[1].abs().max()


def test_no_gradient_without_steps_or_under_no_grad(tiny_sd):
    add_adapters(tiny_sd)
    sampler = DifferentiableSampler(tiny_sd, STEPS)
    assert not sampler(PROMPTS, grad_steps=()).requires_grad
    with torch.no_grad():
        assert not sampler(PROMPTS).requires_grad
    assert sampler.plan.replayed_steps == ()
