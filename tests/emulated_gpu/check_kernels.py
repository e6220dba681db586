"""A whole chain in bf16 through the package's kernels on the emulated GPU, against the same with plain operators."""

import pytest
import torch
from peft import LoraConfig

from alignprop_fast import DifferentiableSampler
from alignprop_fast.ops import attention_backends, autotune, backend, switched_off
from alignprop_fast.ops.activation import geglu
from alignprop_fast.ops.layer_norm import layer_norm

STEPS, PROMPTS = 2, ["a red cat"]


@pytest.fixture
def gradients(tiny_sd, emulated, monkeypatch):
    """(images, gradients) with or without the kernels; counts their launches."""
    from alignprop_fast.kernels import activation, guided_step, norm_modulate

    launched = {}
    for module, name in (
        (activation, "activation_backward"),
        (norm_modulate, "norm_modulate_backward"),
        (guided_step, "guided_step"),
    ):
        kernel = getattr(module, name)

        def counting(*arguments, kernel=kernel, name=name):
            launched[name] = launched.get(name, 0) + 1
            return kernel(*arguments)

        monkeypatch.setattr(module, name, counting)
    monkeypatch.setattr(autotune, "REPETITIONS", 1)
    torch.manual_seed(0)
    tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for parameter in tiny_sd.unet.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    tiny_sd.to("cuda", torch.bfloat16)

    def run(triton):
        monkeypatch.setattr("alignprop_fast.ops.backend._HAS_TRITON", triton)
        wanted = "triton" if triton else "flash"
        monkeypatch.setattr(attention_backends, "fastest", lambda *arguments: wanted)
        monkeypatch.setattr(autotune, "_choices", {})
        launched.clear()
        sampler = DifferentiableSampler(tiny_sd, STEPS, memory_budget=None)
        images = sampler(PROMPTS, None, torch.Generator().manual_seed(3))
        (images * torch.linspace(0, 1, 16, device="cuda")).mean().backward()
        grads = torch.cat([p.grad.flatten() for p in sampler.model.trainable()]).float()
        sampler.model.denoiser.zero_grad()
        return images.detach(), grads, dict(launched)

    return run


@pytest.mark.slow("runs a whole chain in Triton's interpreter")
def test_the_kernels_give_what_plain_operators_give(gradients):
    images, grads, launched = gradients(triton=True)
    plain_images, plain_grads, none = gradients(triton=False)
    assert len(launched) == 3 and not none
    # bf16 has 8 bits, and a chain of networks accumulates rounding; a wrong kernel is off by the size of the signal.
    assert (images - plain_images).abs().max() <= 0.03
    assert torch.nn.functional.cosine_similarity(grads, plain_grads, dim=0) >= 0.99


@pytest.fixture
def no_compiler(monkeypatch):
    """As in a slim image, where Triton finds no gcc for the first kernel."""
    from triton.runtime.interpreter import GridExecutor

    def missing(*arguments, **keywords):
        raise FileNotFoundError(2, "No such file or directory", "gcc")

    monkeypatch.setattr(GridExecutor, "__call__", missing)
    monkeypatch.setattr(backend, "_probed", set())
    yield
    switched_off.forget()


def test_without_a_compiler_the_chain_is_that_of_plain_operators(gradients, no_compiler, caplog):
    images, grads, launched = gradients(triton=True)
    plain_images, plain_grads, _ = gradients(triton=False)
    assert not launched, "the probe has switched Triton off before any of them"
    # The measured choice is replaced here by one that insists on our attention kernels.
    assert set(switched_off.everything()) == {"triton", "attention.triton.forward", "attention.triton.backward"}
    assert len([record for record in caplog.records if "switched off" in record.getMessage()]) == 3
    # Attention in another order of sums, rounded to bf16.
    assert (images - plain_images).abs().max() <= 0.03
    assert torch.nn.functional.cosine_similarity(grads, plain_grads, dim=0) >= 0.99


def test_compiled_code_tries_nothing_and_has_the_same_way_back(emulated, monkeypatch):
    from alignprop_fast.kernels import activation as kernels

    monkeypatch.setattr(backend, "_probed", set())
    generator = torch.Generator().manual_seed(0)
    x, gamma = (torch.randn(shape, generator=generator).to("cuda") for shape in ((3, 8), (8,)))
    x.requires_grad_()

    def both(x):
        return geglu(layer_norm(x, gamma, None))

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert not backend._probed
    expected = both(x)
    assert backend._probed and torch.allclose(y, expected, atol=1e-5)
    grads = [torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)]
    assert torch.allclose(*grads, atol=1e-5)

    def fails(*arguments):
        raise AssertionError

    monkeypatch.setattr(kernels, "activation_forward", fails)
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    assert list(switched_off.everything()) == ["activation.triton"]
    switched_off.forget()
