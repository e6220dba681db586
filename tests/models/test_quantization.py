"""A quantised base: the chain and its gradients are those of a dense model with the quantised values."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from alignprop_fast.generate import DifferentiableSampler
from alignprop_fast.models.lora import add_lora
from alignprop_fast.models.quantization import QuantizedLinear, QuantizedWeight, is_quantized, quantize_linears

KINDS = ["fp8", "int8"] + (["nf4"] if find_spec("bitsandbytes") else [])
CPU = torch.device("cpu")


def dense_twin(pipe):
    """The same pipeline with plain linear layers that hold the quantised values."""
    twin = copy.deepcopy(pipe.unet)
    for module in twin.modules():
        if isinstance(module, QuantizedLinear):
            weight = module.weight.dequantized()
            del module.packed, module.scale
            module.__class__ = nn.Linear
            module.weight = nn.Parameter(weight, requires_grad=False)
    other = copy.copy(pipe)
    other.unet = twin
    return other


def images_and_gradients(pipe):
    sampler = DifferentiableSampler(pipe, num_inference_steps=3)
    images = sampler(["a dog", "red"], generator=torch.Generator().manual_seed(0), grad_steps=[0, 2])
    (images * torch.linspace(0, 1, images.shape[-1])).mean().backward()
    return images.detach(), [p.grad for p in pipe.unet.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
def test_chain_and_gradients_are_those_of_the_dequantised_model(tiny_sd, kind):
    original = copy.deepcopy(tiny_sd.unet.state_dict())
    names = quantize_linears(tiny_sd.unet, kind, CPU, torch.float32, smallest=0)
    parameters = add_lora(tiny_sd, rank=4)
    assert len(names) > 20 and not any("emb" in name or "norm" in name for name in names)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.1)
    twin = dense_twin(tiny_sd)
    assert any((original[f"{name}.weight"] != twin.unet.state_dict().get(f"{name}.weight", 0)).any() for name in names)
    (images, grads), (expected_images, expected_grads) = images_and_gradients(tiny_sd), images_and_gradients(twin)
    torch.testing.assert_close(images, expected_images, rtol=0, atol=1e-6)
    assert len(grads) == len(expected_grads) == len(parameters)
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("kind", "bits", "error"), [("fp8", 8.2, 0.03), ("int8", 8.2, 0.01), ("nf4", 4.25, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_and_error_are_as_stated(kind, bits, error, dtype):
    if kind not in KINDS:
        pytest.skip("needs bitsandbytes")
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(320, 640)).requires_grad_(False).to(dtype)
    weight = root[0].weight.clone()
    assert quantize_linears(root, kind, CPU, dtype) == ["0"] and is_quantized(root)
    found = root[0].weight.dequantized()
    assert found.dtype == dtype and (found.float() - weight.float()).norm() < error * weight.float().norm()
    assert 8 * sum(b.numel() * b.element_size() for b in root[0].buffers()) <= bits * weight.numel()


def test_autograd_saves_no_dense_weight():
    root = nn.Sequential(nn.Linear(256, 320), nn.SiLU(), nn.Linear(320, 256)).requires_grad_(False)
    quantize_linears(root, "int8", CPU, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        root(torch.randn(3, 256, requires_grad=True))
    weights = [t for t in saved if t.ndim == 2 and set(t.shape) == {256, 320}]
    assert len(weights) == 2 and all(isinstance(weight, QuantizedWeight) for weight in weights)


def test_small_layers_and_convolutions_stay(tiny_sd):
    sizes = {name: p.numel() for name, p in tiny_sd.unet.named_parameters()}
    names = quantize_linears(tiny_sd.unet, "int8", CPU, torch.float32)
    assert names and all(sizes[f"{name}.weight"] >= 4096 for name in names)
    assert all(isinstance(tiny_sd.unet.get_submodule(name), nn.Linear) for name in names)
    with pytest.raises(ValueError, match="use fp8, int8, nf4"):
        quantize_linears(tiny_sd.unet, "int3", CPU, torch.float32)
