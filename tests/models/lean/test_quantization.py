"""A quantised base: the chain and its gradients are those of a dense model with the quantised values."""

import copy
from importlib.util import find_spec

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.models.lean.quantization import QuantizedLinear, QuantizedWeight, is_quantized, quantize_linears
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.models.lora.load_save import load_lora, save_lora
from alignprop_fast.models.lora.mix import load_loras, set_lora_weights
from alignprop_fast.models.lora.targets import denoiser, denoiser_name

from ...adapters import draw_factors

KINDS = ["fp8", "int8"] + (["nf4"] if find_spec("bitsandbytes") else [])
CPU = torch.device("cpu")


def dense_twin(pipe):
    """The same pipeline with plain linear layers that hold the quantised values."""
    twin = copy.deepcopy(denoiser(pipe))
    for module in twin.modules():
        if isinstance(module, QuantizedLinear):
            weight = module.weight.dequantized()
            del module.packed, module.scale
            module.__class__ = nn.Linear
            module.weight = nn.Parameter(weight, requires_grad=False)
    other = copy.copy(pipe)
    setattr(other, denoiser_name(pipe), twin)
    return other


def images_and_gradients(pipe):
    sampler = DifferentiableSampler(pipe, num_inference_steps=2, height=16, width=16)
    images = sampler("a dog", generator=torch.Generator().manual_seed(0))
    (images * torch.linspace(0, 1, images.shape[-1])).mean().backward()
    return images.detach(), {name: p.grad for name, p in denoiser(pipe).named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        *(("sd", kind) for kind in KINDS),
        *(
            (model, kind)
            for model in ("z_image", "flux2_klein", "qwen_image", "krea2")
            for kind in KINDS
            if kind != "int8"
        ),
    ],
)
def test_chain_and_gradients_are_those_of_the_dequantised_model(request, model, kind):
    pipe = request.getfixturevalue(f"tiny_{model}")
    original = copy.deepcopy(denoiser(pipe).state_dict())
    names = quantize_linears(denoiser(pipe), kind, CPU, torch.float32, smallest=4)
    parameters = add_lora(pipe, rank=4)
    assert len(names) > 15 and not any(word in name for word in ("emb", "norm", "time_mod") for name in names)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.1)
    twin = dense_twin(pipe)
    changed = denoiser(twin).state_dict()
    assert any((original[f"{name}.weight"] != changed.get(f"{name}.weight", 0)).any() for name in names)
    (images, grads), (expected_images, expected_grads) = images_and_gradients(pipe), images_and_gradients(twin)
    torch.testing.assert_close(images, expected_images, rtol=0, atol=1e-6)
    # Qwen-Image's last block does not use its text, so the adapters there get no gradient.
    assert grads.keys() == expected_grads.keys() and len(grads) >= 0.8 * len(parameters)
    for name, expected in expected_grads.items():
        torch.testing.assert_close(grads[name], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


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
        y = root(torch.randn(3, 256, requires_grad=True))
    kept = (*saved, *(layer.weight for layer in y.grad_fn.layers))
    weights = [t for t in kept if set(t.shape) == {256, 320}]
    assert weights and all(isinstance(weight, QuantizedWeight) for weight in weights)


@pytest.fixture
def lora_folder(tiny_sd_folder, tmp_path):
    """Adapters of rank 4 with random factors, alpha twice the rank."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, local_files_only=True)
    draw_factors(add_lora(pipe, rank=4, alpha=8))
    save_lora(pipe, tmp_path / "lora")
    return tmp_path / "lora"


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("red cat", num_inference_steps=2, generator=generator, output_type="pt").images


LOADERS = {
    "diffusers": lambda pipe, folder: pipe.load_lora_weights(folder),
    "sample": load_lora,
    "evaluate": lambda pipe, folder: set_lora_weights(pipe, {load_loras(pipe, [folder])[0]: 1.0}),
}


@pytest.mark.parametrize("first", ["lora", "quantise"])
@pytest.mark.parametrize("how", LOADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_from_a_file_on_a_quantised_base(tiny_sd, lora_folder, kind, how, first):
    """In either order, the pictures equal those of the dense model with the quantised values and the same adapters."""
    steps = [lambda: LOADERS[how](tiny_sd, lora_folder)]
    steps.insert(first == "lora", lambda: quantize_linears(tiny_sd.unet, kind, CPU, torch.float32, smallest=0))
    for step in steps:
        step()
    assert sum(isinstance(module, QuantizedLinear) for module in tiny_sd.unet.modules()) > 20
    with_adapters = drawn(tiny_sd)
    torch.testing.assert_close(with_adapters, drawn(dense_twin(tiny_sd)), rtol=0, atol=1e-6)
    tiny_sd.disable_lora()
    assert (drawn(tiny_sd) - with_adapters).abs().max() > 1e-2


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fusing_into_a_quantised_base_is_refused(tiny_sd, lora_folder, kind, safe):
    """Without the error PEFT would change a temporary weight, switch the adapters off, and draw the base model."""
    quantize_linears(tiny_sd.unet, kind, CPU, torch.float32, smallest=0)
    load_lora(tiny_sd, lora_folder)
    before = drawn(tiny_sd)
    with pytest.raises(ValueError, match=r"is quantised.*cannot be changed \(fuse_lora.*without base_dtype") as error:
        tiny_sd.fuse_lora(safe_fusing=safe)
    assert "\n" not in str(error.value)
    assert torch.equal(drawn(tiny_sd), before)


def test_a_quantised_weight_is_not_changed_in_place():
    root = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    quantize_linears(root, "int8", CPU, torch.float32)
    weight, before = root[0].weight, root[0].weight.dequantized()
    changes = [lambda: weight.add_(1), lambda: weight.copy_(before), lambda: torch.add(before, 1, out=weight)]
    for change in changes:
        with pytest.raises(ValueError, match="is quantised"):
            change()
    with pytest.raises(ValueError, match="is quantised"):
        weight.data = before
    other = before.clone()
    other.add_(weight)  # reading it is allowed, also to change another tensor
    torch.testing.assert_close(other, 2 * before)
    assert type(weight.data) is QuantizedWeight and torch.equal(weight + 0, before)


def test_small_layers_and_convolutions_stay(tiny_sd):
    sizes = {name: p.numel() for name, p in tiny_sd.unet.named_parameters()}
    names = quantize_linears(tiny_sd.unet, "int8", CPU, torch.float32)
    assert names and all(sizes[f"{name}.weight"] >= 4096 for name in names)
    assert all(isinstance(tiny_sd.unet.get_submodule(name), nn.Linear) for name in names)
    with pytest.raises(ValueError, match="use fp8, int8, nf4"):
        quantize_linears(tiny_sd.unet, "int3", CPU, torch.float32)
