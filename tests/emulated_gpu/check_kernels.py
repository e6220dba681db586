"""A whole chain in bf16 through the package's own kernels on the emulated GPU, beside the same by plain operators."""

import pytest
import torch
from peft import LoraConfig

from alignprop_fast import DifferentiableSampler
from alignprop_fast.ops import attention_backends, choice

STEPS, PROMPTS = 2, ["a red cat", "a dog"]


@pytest.fixture
def gradients(tiny_sd, emulated, monkeypatch):
    """(images, gradients) with the kernels or without; counts what the kernels were launched for."""
    from alignprop_fast.kernels import geglu, guided_step, layer_norm

    launched = {}
    for module, name in ((geglu, "geglu_backward"), (layer_norm, "layer_norm_backward"), (guided_step, "guided_step")):
        kernel = getattr(module, name)

        def counting(*arguments, kernel=kernel, name=name):
            launched[name] = launched.get(name, 0) + 1
            return kernel(*arguments)

        monkeypatch.setattr(module, name, counting)
    monkeypatch.setattr(choice, "REPETITIONS", 1)
    torch.manual_seed(0)
    tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for parameter in tiny_sd.unet.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    tiny_sd.to("cuda", torch.bfloat16)

    def run(triton):
        monkeypatch.setattr("alignprop_fast.ops.backend._HAS_TRITON", triton)
        wanted = "triton" if triton else "flash"
        monkeypatch.setattr(attention_backends, "fastest", lambda problem, candidates, device: wanted)
        launched.clear()
        sampler = DifferentiableSampler(tiny_sd, STEPS)
        images = sampler(PROMPTS, None, torch.Generator().manual_seed(3))
        (images * torch.linspace(0, 1, 16, device="cuda")).mean().backward()
        grads = torch.cat([p.grad.flatten() for p in sampler.model.trainable()]).float()
        sampler.model.denoiser.zero_grad()
        return images.detach(), grads, dict(launched)

    return run


def test_the_kernels_give_what_plain_operators_give(gradients):
    images, grads, launched = gradients(triton=True)
    plain_images, plain_grads, none = gradients(triton=False)
    assert len(launched) == 3 and not none
    # bf16 has 8 bits, and a chain of networks adds its roundings up; a wrong kernel is off by the whole signal.
    assert (images - plain_images).abs().max() <= 0.03
    assert torch.nn.functional.cosine_similarity(grads, plain_grads, dim=0) >= 0.99
