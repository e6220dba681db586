"""Tensors other than the denoiser's adapters get the gradient of plain autograd through diffusers' pipeline.

The reference is the pipeline's `__call__` without its `no_grad`. Tolerances as in `plain_autograd`.
"""

import pytest
import torch
from diffusers import DDIMScheduler

from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.planner import BlockOption, Plan, StageChoice

from .plain_autograd import PROMPTS, assert_equal_gradient, denoiser_of, reward

STEPS, SCALE = 3, 4.0
FLUX = {"true_cfg_scale": 2.0, "height": 32, "width": 48}  # its own size is the real one
KINDS = {
    "resident": ((1, 2), (0,), "batch"),
    "replayed": ((), (0, 1, 2), "image"),
}


@pytest.fixture(params=["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux"])
def pipe(request):
    """Nothing is trainable."""
    pipe = request.getfixturevalue(request.param)
    if hasattr(pipe, "unet"):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def seeded(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent_shape(sampler):
    channels = sampler.model.latent_channels
    return (len(PROMPTS), channels, *(side // sampler.model.pipe.vae_scale_factor for side in sampler.size))


def theirs(pipe, latents, embeddings=None, **options):
    """Images of diffusers' own pipeline, with gradient."""
    if "Flux" in type(pipe).__name__:
        latents = pipe._pack_latents(latents, *latents.shape)
    texts = {"prompt": PROMPTS, "negative_prompt": ["", ""]} if embeddings is None else embeddings
    flux = FLUX if "Flux" in type(pipe).__name__ else {}
    return type(pipe).__call__.__wrapped__(
        pipe,
        **{"guidance_scale": SCALE, **texts, **flux, **options},
        num_inference_steps=STEPS,
        latents=latents,
        output_type="pt",
        return_dict=False,
    )[0]


def sampler_of(pipe, **options):
    flux = FLUX if "Flux" in type(pipe).__name__ else {}
    return DifferentiableSampler(pipe, STEPS, eta=0.0, **{"guidance_scale": SCALE, **flux, **options})


def plan(kind):
    resident, replayed, decoder = KINDS[kind]
    return Plan(
        num_steps=STEPS,
        resident_steps=resident,
        replayed_steps=replayed,
        resident_options=({"*": BlockOption.KEEP},) * len(resident),
        replay_options={"*": BlockOption.RECOMPUTE},
        decoder=StageChoice(decoder, {"*": BlockOption.KEEP}),
    )


def encoded(pipe):
    """Embeddings of prompts and negative prompts, by the names of the pipeline's call; leaves that require a gradient.

    Only the first few of T5's hundreds of tokens, which take most of the time."""
    if "Flux" in type(pipe).__name__:
        found = {}
        for side, texts in (("", PROMPTS), ("negative_", ["", ""])):
            found[f"{side}prompt_embeds"], found[f"{side}pooled_prompt_embeds"], _ = pipe.encode_prompt(texts, None)
    elif hasattr(pipe, "text_encoder_2"):
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        third = {"prompt_3": None} if hasattr(pipe, "text_encoder_3") else {}
        texts = pipe.encode_prompt(PROMPTS, prompt_2=None, **third, do_classifier_free_guidance=True)
        found = dict(zip(names, texts, strict=True))
    else:
        cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
        found = {"prompt_embeds": cond, "negative_prompt_embeds": uncond}
    short = {name: t[:, :80] if t.ndim == 3 else t for name, t in found.items()}
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in short.items()}


def constant(pipe):
    return {name: tensor.detach() for name, tensor in encoded(pipe).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_initial_latents_of_a_frozen_model(pipe, kind):
    sampler = sampler_of(pipe)
    ours = seeded(latent_shape(sampler)).requires_grad_()
    reference = ours.detach().clone().requires_grad_()
    texts = constant(pipe)
    reward(sampler(PROMPTS, embeddings=texts, latents=ours, plan=plan(kind))).backward()
    reward(theirs(pipe, reference, texts)).backward()
    assert_equal_gradient(ours.grad, reference.grad)


def test_initial_latents_without_a_plan_of_ones_own(tiny_sd):
    tiny_sd.unet.requires_grad_(False)
    sampler = sampler_of(tiny_sd)
    ours = seeded(latent_shape(sampler)).requires_grad_()
    reference = ours.detach().clone().requires_grad_()
    sampler(PROMPTS, latents=ours).sum().backward()
    assert sampler.plan.replayed_steps == (0, 1, 2)
    theirs(tiny_sd, reference).sum().backward()
    assert_equal_gradient(ours.grad, reference.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_that_are_given(pipe, kind):
    sampler = sampler_of(pipe)
    latents = seeded(latent_shape(sampler))
    ours, reference = encoded(pipe), encoded(pipe)
    images = sampler(PROMPTS, embeddings=ours, latents=latents, plan=plan(kind))
    expected = theirs(pipe, latents, reference)
    assert (images - expected).abs().max() <= 1e-5
    reward(images).backward()
    reward(expected).backward()
    for name, tensor in reference.items():
        assert_equal_gradient(ours[name].grad, tensor.grad)


def test_learned_tokens_and_adapters_at_once(pipe):
    """Learning parameters of a text encoder, chosen before set-up, and one parameter of the denoiser."""
    block = next(iter(denoiser_of(pipe).parameters()))
    tokens = pipe.text_encoder.get_input_embeddings().weight
    for parameter in (block, tokens):
        parameter.requires_grad_()
    sampler = sampler_of(pipe)
    latents = seeded(latent_shape(sampler))
    reward(sampler(PROMPTS, ["", ""], latents=latents)).backward()
    ours = [block.grad.clone(), tokens.grad.clone()]
    block.grad = tokens.grad = None
    reward(theirs(pipe, latents)).backward()
    for mine, parameter in zip(ours, (block, tokens), strict=True):
        assert_equal_gradient(mine, parameter.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_scale(pipe, kind):
    """For FLUX, the scale of its second branch."""
    name = "true_cfg_scale" if "Flux" in type(pipe).__name__ else "guidance_scale"
    ours, reference = (torch.tensor(SCALE, requires_grad=True) for _ in range(2))
    sampler = sampler_of(pipe, **{name: ours})
    latents, texts = seeded(latent_shape(sampler)), constant(pipe)
    images = sampler(PROMPTS, embeddings=texts, latents=latents, plan=plan(kind))
    expected = theirs(pipe, latents, texts, **{name: reference})
    assert (images - expected).abs().max() <= 1e-5
    reward(images).backward()
    reward(expected).backward()
    assert_equal_gradient(ours.grad, reference.grad)


def test_distilled_guidance(tiny_flux):
    """The pipeline takes a number there, so the reference is a difference of its rewards, in float64.

    The model's input is cosines of 1000 times the guidance, in fp32. A step of 2^-13 to each side is 0.12 radian, so
    the difference's error is 0.3 %; fp32's rounding of 4000 radians adds 0.1 %.
    """
    pipe, step = tiny_flux.to(torch.float64), 2.0**-13
    ours = torch.tensor(SCALE, requires_grad=True)
    sampler = sampler_of(pipe, guidance_scale=ours)
    latents, texts = seeded(latent_shape(sampler)).double(), constant(pipe)
    reward(sampler(PROMPTS, embeddings=texts, latents=latents)).backward()
    with torch.no_grad():
        more, less = (
            reward(theirs(pipe, latents, texts, guidance_scale=SCALE + sign * step).double()) for sign in (1, -1)
        )
    assert ours.grad.item() == pytest.approx(((more - less) / (2 * step)).item(), rel=1e-2)


def test_a_reward_that_reads_latents(tiny_sd):
    tiny_sd.unet.requires_grad_(False)
    sampler = sampler_of(tiny_sd)
    ours = seeded(latent_shape(sampler)).requires_grad_()
    reference = ours.detach().clone().requires_grad_()
    images = sampler(PROMPTS, latents=ours)
    (reward(images) + sampler.latents.square().sum()).backward()
    final = type(tiny_sd).__call__.__wrapped__(
        tiny_sd, PROMPTS, num_inference_steps=STEPS, guidance_scale=SCALE, latents=reference, output_type="latent"
    )[0]
    (reward(theirs(tiny_sd, reference)) + final.square().sum()).backward()
    assert_equal_gradient(ours.grad, reference.grad)


def test_a_budget_counts_who_else_receives(tiny_sd):
    tiny_sd.unet.requires_grad_(False)
    sampler = sampler_of(tiny_sd, memory_budget="8GiB")
    latents = seeded(latent_shape(sampler))
    ours, reference = encoded(tiny_sd), encoded(tiny_sd)
    reward(sampler(PROMPTS, embeddings=ours, latents=latents)).backward()
    assert sampler.plan.resident_steps
    reward(theirs(tiny_sd, latents, reference)).backward()
    for name, tensor in reference.items():
        assert_equal_gradient(ours[name].grad, tensor.grad)


def test_what_cannot_get_a_gradient_is_refused(tiny_sd):
    wanted = torch.tensor(0.5, requires_grad=True)
    for option in ("eta", "guidance_rescale"):
        with pytest.raises(ValueError, match=f"{option} is a tensor that requires a gradient"):
            DifferentiableSampler(tiny_sd, STEPS, **{option: wanted})
    with pytest.raises(ValueError, match="give one number for all prompts"):
        DifferentiableSampler(tiny_sd, STEPS, torch.tensor([1.0, 2.0]))
    tiny_sd.text_encoder.get_input_embeddings().weight.requires_grad_()
    sampler = DifferentiableSampler(tiny_sd, STEPS, cache_text=True)
    with pytest.raises(ValueError, match="leave cache_text out"):
        sampler(PROMPTS)


def test_tokens_that_have_changed_are_not_remembered_as_they_were(tiny_sd):
    tokens = tiny_sd.text_encoder.get_input_embeddings().weight.requires_grad_()
    sampler = sampler_of(tiny_sd, cache_text=True)
    latents = seeded(latent_shape(sampler))
    with torch.no_grad():
        before = sampler(PROMPTS, latents=latents)
        tokens.mul_(-1)
        after = sampler(PROMPTS, latents=latents)
        assert (after - theirs(tiny_sd, latents)).abs().max() <= 1e-5 < (after - before).abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: {"prompt_embed": e["prompt_embeds"]}, "unknown embeddings prompt_embed: use prompt_embeds"),
        (lambda e: {"prompt_embeds": e["prompt_embeds"]}, "without pooled_prompt_embeds: give"),
        (lambda e: {name: t[:1] for name, t in e.items()}, "has 1 rows for 2 prompts"),
    ],
)
def test_embeddings_that_do_not_fit(tiny_sdxl, change, message):
    with pytest.raises(ValueError, match=message):
        sampler_of(tiny_sdxl)(PROMPTS, embeddings=change(encoded(tiny_sdxl)))


def test_conditions_that_are_made_of_each_other(tiny_sd3):
    """Pooled embeddings and a guidance scale computed from the same tensor as the embeddings."""
    sampler = sampler_of(tiny_sd3)
    latents = seeded(latent_shape(sampler))
    grads = []
    for run in (lambda e: sampler(PROMPTS, embeddings=e, latents=latents), lambda e: theirs(tiny_sd3, latents, e)):
        texts = constant(tiny_sd3)
        shared = torch.ones(texts["prompt_embeds"].shape[-1], requires_grad=True)
        texts["prompt_embeds"] = texts["prompt_embeds"] * shared
        texts["pooled_prompt_embeds"] = texts["pooled_prompt_embeds"] * texts["prompt_embeds"].mean()
        reward(run(texts)).backward()
        grads.append(shared.grad)
    assert_equal_gradient(*grads)


def test_a_guidance_scale_that_moves_the_embeddings_too(tiny_sd):
    texts, grads = constant(tiny_sd), []
    latents = seeded(latent_shape(sampler_of(tiny_sd)))
    for ours in (True, False):
        scale = torch.tensor(SCALE, requires_grad=True)
        moved = {**texts, "prompt_embeds": texts["prompt_embeds"] * scale}
        if ours:
            images = sampler_of(tiny_sd, guidance_scale=scale)(PROMPTS, embeddings=moved, latents=latents)
        else:
            images = theirs(tiny_sd, latents, moved, guidance_scale=scale)
        reward(images).backward()
        grads.append(scale.grad)
    assert_equal_gradient(*grads)


def test_a_whole_text_encoder_learns_where_its_user_has_frozen_the_rest(tiny_sd):
    tiny_sd.text_encoder.requires_grad_(True)
    sampler = sampler_of(tiny_sd)
    latents = seeded(latent_shape(sampler))
    learned = [tiny_sd.text_encoder.get_input_embeddings().weight, next(iter(tiny_sd.text_encoder.parameters()))]
    reward(sampler(PROMPTS, ["", ""], latents=latents)).backward()
    ours = [parameter.grad.clone() for parameter in learned]
    tiny_sd.text_encoder.zero_grad()
    reward(theirs(tiny_sd, latents)).backward()
    for mine, parameter in zip(ours, learned, strict=True):
        assert_equal_gradient(mine, parameter.grad)


def test_a_pipeline_as_it_is_loaded_learns_in_its_denoiser_alone(tiny_sd):
    for part in (tiny_sd.unet, tiny_sd.vae, tiny_sd.text_encoder):
        part.requires_grad_(True)
    sampler_of(tiny_sd)
    assert not any(p.requires_grad for part in (tiny_sd.vae, tiny_sd.text_encoder) for p in part.parameters())
    assert all(p.requires_grad for p in tiny_sd.unet.parameters())


def test_embeddings_need_no_text_encoder(tiny_sdxl):
    """The negative ones are zeros, as in SDXL's pipeline."""
    texts = {name: t for name, t in constant(tiny_sdxl).items() if "negative" not in name}
    tiny_sdxl.register_modules(text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    tiny_sdxl.register_to_config(force_zeros_for_empty_prompt=True)
    sampler = sampler_of(tiny_sdxl)
    latents = seeded(latent_shape(sampler))
    assert (sampler(PROMPTS, embeddings=texts, latents=latents) - theirs(tiny_sdxl, latents, texts)).abs().max() <= 1e-5
