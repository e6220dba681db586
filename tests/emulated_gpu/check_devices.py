"""A pipeline on a GPU that is not the current one: every allocation, launch and measurement must name its device."""

import pytest
import torch

from alignprop_fast import DifferentiableSampler
from alignprop_fast.ops import autotune, switched_off
from alignprop_fast.ops.attention import attention, attention_reference
from alignprop_fast.ops.layer_norm import layer_norm, layer_norm_reference
from alignprop_fast.ops.norm_modulate import backend
from alignprop_fast.runtime.offload import HostPool, Offloader

STEPS, PROMPTS = 3, ["a red cat"]


@pytest.fixture(autouse=True)
def another_is_current(emulated):
    torch.cuda.set_device(1)
    yield
    torch.cuda.set_device(0)
    assert not switched_off.everything()


def test_the_emulated_gpu_refuses_what_names_no_device():
    for made in (torch.cuda.Stream, torch.cuda.Event().record, torch.cuda.synchronize):
        with pytest.raises(RuntimeError, match="not named"):
            made()
    torch.cuda.synchronize("cuda:0")


def test_kernels_and_their_choice(monkeypatch):
    monkeypatch.setattr(autotune, "REPETITIONS", 1)
    x = torch.linspace(-1, 1, 240, device="cuda:0").view(3, 80).requires_grad_()
    assert backend(x) == "triton"
    gamma = torch.ones(80, device="cuda:0")
    for fn in (layer_norm, layer_norm_reference):
        y = fn(x, gamma, None, 1e-5)
        # fp32 sums of 80 terms in another order.
        assert torch.allclose(y, layer_norm_reference(x, gamma, None, 1e-5), atol=1e-5)
        torch.autograd.grad(y.sum(), x)
    q = torch.linspace(-1, 1, 2 * 16 * 32, device="cuda:0").view(1, 2, 16, 32).requires_grad_()
    o = attention(q, q, q)
    assert torch.allclose(o.cpu(), attention_reference(*[q.detach().cpu()] * 3), atol=1e-5)
    torch.autograd.grad(o.sum(), q)
    assert all("not named" not in str(times) for times in autotune._table(autotune.device_name(q.device)).values())


def test_graphs(tiny_sd, plain_kernels):
    tiny_sd.to("cuda:0")
    images = DifferentiableSampler(tiny_sd, STEPS, memory_budget=None, cuda_graphs="on")(
        PROMPTS, None, torch.Generator().manual_seed(0)
    )
    plain = DifferentiableSampler(tiny_sd, STEPS, memory_budget=None)(PROMPTS, None, torch.Generator().manual_seed(0))
    assert torch.equal(images, plain)


@pytest.mark.parametrize("adapted", ["tiny_sd"], indirect=True)
def test_offloading_and_measuring(adapted, plain_kernels):
    sampler = DifferentiableSampler(adapted.to("cuda:0"), STEPS, memory_budget="10GiB")
    sampler(PROMPTS, None, torch.Generator().manual_seed(0)).sum().backward()
    assert all(parameter.grad is not None for parameter in sampler.model.trainable())
    device = torch.device("cuda", 0)
    HostPool(device).take(4096)
    assert Offloader(device).out.device == device
