"""What tests of the sampler compare it with: adapters, a scalar of the images, and gradients by plain autograd.

Tolerances: images and gradients of fp32 chains differ only by rounding. Measured: 1e-6 (images), 1e-5 (gradients,
relative to the largest element of the tensor). Asserted: ten times that, 1e-5 and 1e-4. The contract is 1e-3.
"""

import torch
from peft import LoraConfig

from ..adapters import draw_factors, factors_of

PROMPTS = ["red cat", "dog and cat"]
UNET_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def add_adapters(pipe, targets=UNET_TARGETS):
    denoiser_of(pipe).add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    draw_factors(factors_of(denoiser_of(pipe)), seed=3)
    return pipe


def reward(images):
    """A smooth scalar of the images with no symmetry that could hide a wrong index."""
    ramp = torch.linspace(-1, 2, images[0].numel()).reshape(images[0].shape)
    return (images * ramp).sin().sum() + (images**2 * ramp.flip(-1)).sum()


def gradients(pipe, images, more=0.0):
    """By name, of reward plus `more`, for the parameters that get one."""
    named = {n: p for n, p in denoiser_of(pipe).named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(reward(images) + more, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


def assert_equal_gradient(ours, theirs, name=""):
    assert theirs.abs().max() > 0, name
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name


def assert_equal_gradients(ours, theirs):
    assert theirs and ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert_equal_gradient(ours[name], grad, name)
