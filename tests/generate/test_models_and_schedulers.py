"""Every model with every scheduler that fits it, in fp32: images and gradients equal those of diffusers' pipeline.

The reference is plain autograd through diffusers: the pipeline's `__call__` without its `no_grad`, with detached
predictions in steps without gradient. Tolerances as in `plain_autograd`.
"""

import pytest
import torch
from torch.utils._pytree import tree_map

from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.models.schedules import make_scheduler
from alignprop_fast.planner import BlockOption, Plan

from .plain_autograd import PROMPTS, UNET_TARGETS, add_adapters, assert_equal_gradient, denoiser_of, gradients, reward

NEGATIVE, LONG = ["dog", "cat"], ["dog", "cat " * 9]
STEPS, SIZE = 4, {"height": 16, "width": 24}
JOINT_TARGETS = [*UNET_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
SCHEDULERS = {
    "ddim": ("ddim", {}),
    "euler": ("euler", {"timestep_spacing": "trailing"}),
    "euler-v": ("euler", {"prediction_type": "v_prediction"}),
    "euler-ancestral": ("euler-ancestral", {}),
    "dpm++2m": ("dpm++2m", {}),
    "dpm++2m-karras": ("dpm++2m", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
}


def reference(pipe, grad_steps, **arguments):
    """Images by the pipeline's own code, with a graph."""
    model, times = denoiser_of(pipe), []
    own = model.forward

    def forward(*args, **kwargs):
        time = float(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0])
        if time not in times:
            times.append(time)
        (y,) = own(*args, **kwargs)
        return (y if times.index(time) in grad_steps else tree_map(torch.detach, y),)

    model.forward = forward
    try:
        return own_images(pipe, prompt=list(PROMPTS), **arguments)  # Z-Image's pipeline writes into the prompts
    finally:
        del model.forward


def own_images(pipe, **arguments):
    """The pipeline's call, with a graph."""
    settings = {"num_inference_steps": STEPS, "output_type": "pt", **SIZE, **arguments}
    return type(pipe).__call__.__wrapped__(pipe, generator=torch.Generator().manual_seed(1), **settings).images


def make_plan(grad_steps):
    """The first gradient step is replayed with its blocks recomputed; the others are resident and keep something."""
    return Plan(
        STEPS,
        grad_steps[1:],
        grad_steps[:1],
        ({"*": BlockOption.QKV},) * (len(grad_steps) - 1),
        {"*": BlockOption.RECOMPUTE},
    )


def check(pipe, theirs, images):
    assert theirs.shape == images.shape and images.shape[2] != images.shape[3] and theirs.std() > 0.01
    assert (images - theirs).abs().max() < 1e-5
    ours_grads, theirs_grads = gradients(pipe, images), gradients(pipe, theirs)
    assert ours_grads.keys() == theirs_grads.keys()
    # SD3's last block does not use its text, so its adapters there get zeros.
    assert sum(bool(grad.abs().max() > 0) for grad in theirs_grads.values()) > 0.9 * len(theirs_grads) > 0
    for name, grad in theirs_grads.items():
        assert (ours_grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


def shifted(pipe, dynamic):
    """With flow-match Euler, whose shift follows the size of the picture if it is dynamic."""
    pipe.scheduler = make_scheduler("flow-euler", {**pipe.scheduler.config, "use_dynamic_shifting": dynamic})
    return pipe


def compare(pipe, grad_steps, negative=None, size=SIZE, only_theirs=None, **guidance):
    """Images and gradients of the adapters are those of the pipeline. only_theirs: arguments of the pipeline alone."""
    texts = {} if negative is None else {"negative_prompt": list(negative)}
    theirs = reference(pipe, grad_steps, **texts, **guidance, **size, **(only_theirs or {}))
    sampler = DifferentiableSampler(pipe, STEPS, **guidance, **size)
    check(pipe, theirs, sampler(PROMPTS, negative, torch.Generator().manual_seed(1), plan=make_plan(grad_steps)))


def compare_leaves(pipe, leaves, embeddings, **guidance):
    """Images, and gradients of the embeddings and the scale of guidance, are those of the pipeline."""
    theirs = own_images(pipe, **embeddings, **guidance)
    sampler, generator = DifferentiableSampler(pipe, STEPS, **guidance, **SIZE), torch.Generator().manual_seed(1)
    images = sampler(PROMPTS, None, generator, plan=make_plan((0, 1, 2, 3)), embeddings=embeddings)
    assert (images - theirs).abs().max() < 1e-5
    expected = torch.autograd.grad(reward(theirs), leaves)
    for ours, grad in zip(torch.autograd.grad(reward(images), leaves), expected, strict=True):
        assert_equal_gradient(ours, grad)


@pytest.mark.parametrize(
    ("model", "scale", "grad_steps", "scheduler"),
    [
        *(("tiny_sd", 5.0, (0, 2), scheduler) for scheduler in SCHEDULERS),
        *(("tiny_sdxl", 5.0, (1, 2, 3), scheduler) for scheduler in ("euler", "dpm++2m")),
        ("tiny_sdxl", 1.0, (0, 1, 2, 3), "euler-ancestral"),
    ],
)
def test_unets(model, scale, grad_steps, scheduler, request):
    pipe = add_adapters(request.getfixturevalue(model))
    name, options = SCHEDULERS[scheduler]
    pipe.scheduler = make_scheduler(name, {**pipe.scheduler.config, **options})
    compare(pipe, grad_steps, NEGATIVE, only_theirs={"eta": 1.0}, guidance_scale=scale)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("scale", "grad_steps"), [(5.0, (0, 2)), (1.0, (0, 1, 2, 3))])
def test_sd3(tiny_sd3, scale, grad_steps, dynamic):
    pipe = shifted(add_adapters(tiny_sd3, JOINT_TARGETS), dynamic)
    compare(pipe, grad_steps, NEGATIVE, guidance_scale=scale)


@pytest.mark.parametrize(
    ("true_cfg_scale", "negative", "grad_steps"), [(1.0, NEGATIVE, (1, 3)), (3.0, NEGATIVE, (0, 2)), (3.0, None, (3,))]
)
def test_flux(tiny_flux, true_cfg_scale, negative, grad_steps):
    pipe = add_adapters(tiny_flux, JOINT_TARGETS)
    compare(pipe, grad_steps, negative, guidance_scale=3.5, true_cfg_scale=true_cfg_scale)


@pytest.mark.parametrize(("scale", "negative", "grad_steps"), [(5.0, LONG, (1, 2)), (1.0, None, (0, 1, 2, 3))])
def test_chroma(tiny_chroma, scale, negative, grad_steps):
    """Texts of different lengths, whose padding the denoiser sees less than the rest."""
    pipe = shifted(add_adapters(tiny_chroma, [*JOINT_TARGETS, "proj_mlp"]), dynamic=scale == 1)
    compare(pipe, grad_steps, negative, guidance_scale=scale)


@pytest.mark.parametrize(
    ("scale", "negative", "grad_steps"),
    [(4.0, ["dog", "cat " * 40], (0, 2)), (4.0, None, (0, 1, 2, 3)), (0.0, None, (1, 2))],
)
def test_z_image(tiny_z_image, scale, negative, grad_steps):
    """With captions of different lengths, each padded to a multiple of 32 tokens by the network."""
    compare(shifted(add_adapters(tiny_z_image), dynamic=scale == 0), grad_steps, negative, guidance_scale=scale)


@pytest.mark.parametrize(
    "limits", [{"cfg_normalization": 0.5}, {"cfg_truncation": 0.1}, {"cfg_normalization": 1.0, "cfg_truncation": 0.1}]
)
def test_z_image_with_limits_of_guidance(tiny_z_image, limits):
    """0.1: of the steps with gradient the first is guided, the second is not."""
    pipe = add_adapters(tiny_z_image)
    theirs = reference(pipe, (0, 2), guidance_scale=4.0, **limits)
    assert (theirs - reference(pipe, (0, 2), guidance_scale=4.0)).abs().max() > 1e-3
    sampler = DifferentiableSampler(pipe, STEPS, 4.0, **limits, **SIZE)
    check(pipe, theirs, sampler(PROMPTS, None, torch.Generator().manual_seed(1), plan=make_plan((0, 2))))


def test_a_step_alone_is_guided_as_in_its_chain(tiny_z_image):
    add_adapters(tiny_z_image)
    kinds = {"some": (4.0, 0.1), "all": (4.0, 1.0), "none": (0.0, 1.0)}
    samplers = {
        name: DifferentiableSampler(tiny_z_image, STEPS, scale, cfg_truncation=until, **SIZE)
        for name, (scale, until) in kinds.items()
    }
    latents = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    for step, same in ((1, "all"), (2, "none")):
        images = {
            name: sampler.renoise(latents, PROMPTS, None, torch.Generator().manual_seed(1), step=step)
            for name, sampler in samplers.items()
        }
        assert torch.equal(images["some"], images[same]) and not torch.equal(images["all"], images["none"])


@pytest.mark.parametrize("limit", [{"cfg_normalization": 1.0}, {"cfg_truncation": 0.5}])
def test_limits_of_guidance_are_options_of_z_image(tiny_sd, limit):
    with pytest.raises(ValueError, match=r"cfg_\w+ is an option of Z-Image: leave it out for other models"):
        DifferentiableSampler(tiny_sd, STEPS, **limit)


def test_what_else_learns_with_z_image(tiny_z_image):
    """Captions, in a list as the pipeline takes them, and the guidance scale."""
    captions, negative = tiny_z_image.encode_prompt(list(PROMPTS), negative_prompt=["dog", "cat " * 40])
    leaves = [torch.tensor(3.0), *(text.detach() for text in (*captions, *negative))]
    scale, *texts = (leaf.requires_grad_() for leaf in leaves)
    embeddings = {"prompt_embeds": texts[:2], "negative_prompt_embeds": texts[2:]}
    compare_leaves(tiny_z_image, leaves, embeddings, guidance_scale=scale)


@pytest.mark.parametrize(
    ("scale", "negative", "grad_steps"), [(4.0, LONG, (1, 2)), (4.0, None, (0, 1, 2, 3)), (1.0, NEGATIVE, (0, 3))]
)
def test_qwen_image(tiny_qwen_image, scale, negative, grad_steps):
    """Without a negative prompt it is not guided. Texts differ in length, and are longer in the unguided branch."""
    pipe = add_adapters(tiny_qwen_image, [*JOINT_TARGETS, "txt_mlp.net.2"])
    compare(pipe, grad_steps, negative, true_cfg_scale=scale)


def test_what_else_learns_with_qwen_image(tiny_qwen_image):
    """Embeddings with their masks, and the scale of guidance that keeps the norm of predictions."""
    given = {}
    for side, texts in (("", PROMPTS), ("negative_", LONG)):
        embeds, mask = tiny_qwen_image.encode_prompt(texts)
        given |= {f"{side}prompt_embeds": embeds.detach(), f"{side}prompt_embeds_mask": mask}
    leaves = [torch.tensor(3.0), given["prompt_embeds"], given["negative_prompt_embeds"]]
    scale, *_ = (leaf.requires_grad_() for leaf in leaves)
    compare_leaves(tiny_qwen_image, leaves, given, true_cfg_scale=scale)


@pytest.mark.parametrize("grad_steps", [(0, 2), (0, 1, 2, 3)])
def test_flux2_dev(tiny_flux2_dev, grad_steps):
    compare(add_adapters(tiny_flux2_dev, [*JOINT_TARGETS, "to_qkv_mlp_proj"]), grad_steps, guidance_scale=3.5)


@pytest.mark.parametrize(("scale", "negative", "grad_steps"), [(4.0, LONG, (1, 2)), (0.0, None, (0, 1, 2, 3))])
def test_krea2(tiny_krea2, scale, negative, grad_steps):
    pipe = add_adapters(tiny_krea2, [*UNET_TARGETS, "to_gate", "ff.down"])
    pipe.register_to_config(is_distilled=scale == 0)
    compare(pipe, grad_steps, negative, guidance_scale=scale)


@pytest.mark.parametrize(("scale", "grad_steps"), [(4.0, (0, 2)), (1.0, (0, 1, 2, 3))])
def test_flux2_klein(tiny_flux2_klein, scale, grad_steps):
    compare(add_adapters(tiny_flux2_klein, [*JOINT_TARGETS, "to_qkv_mlp_proj"]), grad_steps, guidance_scale=scale)


@pytest.mark.parametrize(("scale", "negative", "grad_steps"), [(4.0, LONG, (1, 2)), (1.0, None, (0, 1, 2, 3))])
def test_lumina2(tiny_lumina2, scale, negative, grad_steps):
    """Guidance keeps the norm of each row of latents. Texts differ in length."""
    pipe = add_adapters(tiny_lumina2, [*UNET_TARGETS, "linear_2", "norm1.linear"])
    size = {"height": 32, "width": 48}
    compare(shifted(pipe, dynamic=scale == 1), grad_steps, negative, size, guidance_scale=scale)


@pytest.mark.parametrize(
    ("scheduler", "scale", "negative", "grad_steps"),
    [("dpm++2m", 4.5, LONG, (1, 2)), ("dpm++2m", 1.0, None, (0, 1, 2, 3)), ("flow-euler", 4.5, None, (0, 2))],
)
def test_sana(tiny_sana, scheduler, scale, negative, grad_steps):
    pipe, size = add_adapters(tiny_sana), {"height": 32, "width": 64}
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler.config)
    compare(pipe, grad_steps, negative, size, {"use_resolution_binning": False}, guidance_scale=scale)
