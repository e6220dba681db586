"""The ops for frozen weights in a diffusers UNet and decoder: same values and names, less kept, and removable.

Tolerance: fp32 rounding through a whole network; measured 1e-5 of the largest element, asserted at 1e-4.
"""

import copy

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alignprop_fast.models import adapt
from alignprop_fast.models.conditioning import PromptBatch
from alignprop_fast.models.lean.attention import LeanAttnProcessor, LeanFluxAttnProcessor, LeanJointAttnProcessor
from alignprop_fast.models.lean.flux2 import LeanFlux2AttnProcessor, LeanFlux2ParallelSelfAttnProcessor
from alignprop_fast.models.lean.krea2 import LeanKrea2AttnProcessor
from alignprop_fast.models.lean.lumina2 import LeanLumina2AttnProcessor
from alignprop_fast.models.lean.qwen_image import LeanQwenDoubleStreamAttnProcessor
from alignprop_fast.models.lean.surgery import (
    FrozenConv2d,
    LeanGEGLU,
    LeanGroupNorm,
    LeanLayerNorm,
    LeanLinear,
    LeanLoraLinear,
    LeanResnetBlock2D,
    put_ops_in,
    take_ops_out,
)
from alignprop_fast.models.lean.z_image import LeanZSingleStreamAttnProcessor
from alignprop_fast.planner import GRADES, BlockOption
from alignprop_fast.runtime import Block, PeakMeter, apply_options, blocks_of

LEAN_MODULES = {FrozenConv2d, LeanGEGLU, LeanGroupNorm, LeanLayerNorm, LeanLinear, LeanLoraLinear, LeanResnetBlock2D}


@pytest.fixture
def unet(tiny_sd):
    tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return tiny_sd.unet


def run(unet, x):
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    y = unet(x, torch.tensor(300), text).sample
    grads = torch.autograd.grad(y.square().sum(), [x, *(p for p in unet.parameters() if p.requires_grad)])
    return [y.detach(), *grads]


def test_values_and_gradients_stay(unet):
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    stock = run(unet, x)
    put_ops_in(unet)
    kinds = {type(module) for module in unet.modules()}
    assert kinds >= LEAN_MODULES
    assert {type(processor) for processor in unet.attn_processors.values()} == {LeanAttnProcessor}
    for lean_value, value in zip(run(unet, x), stock, strict=True):
        assert (lean_value - value).abs().max() <= 1e-4 * value.abs().max()


@pytest.mark.parametrize(
    ("model", "processor", "prompt"),
    [
        ("tiny_sd3", LeanJointAttnProcessor, "red cat"),
        ("tiny_flux", LeanFluxAttnProcessor, "red cat"),
        ("tiny_chroma", LeanFluxAttnProcessor, "red cat"),
        *(("tiny_lumina2", LeanLumina2AttnProcessor, prompt) for prompt in ("", "red cat" * 12)),
        ("tiny_flux2_klein", LeanFlux2AttnProcessor, "red cat"),
        ("tiny_flux2_klein", LeanFlux2ParallelSelfAttnProcessor, "red cat"),
        *(("tiny_krea2", LeanKrea2AttnProcessor, prompt) for prompt in ("", "red cat" * 12)),
        *(("tiny_qwen_image", LeanQwenDoubleStreamAttnProcessor, prompt) for prompt in ("", "red cat" * 12)),
        # Z-Image's prompt as long as the empty one, up to padding, needs no mask.
        *(("tiny_z_image", LeanZSingleStreamAttnProcessor, prompt) for prompt in ("red cat", "red cat" * 12)),
    ],
)
def test_values_and_gradients_of_transformers_stay(model, processor, prompt, request, monkeypatch):
    pipe = request.getfixturevalue(model)
    targets = [
        "to_q",
        "to_v",
        "add_k_proj",
        "to_add_out",
        "proj_mlp",
        "proj_out",
        "net.0.proj",
        "w2",
        "to_qkv_mlp_proj",
        "linear_in",
        "norm1.linear",
        "img_mod.1",
        "ff.gate",
        "linear_2",
    ]
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapter = adapt(pipe)
    cond = adapter.encode(PromptBatch([prompt], None, True, (16, 32)))
    x = torch.randn(1, *adapter.latent_shape((16, 32)), requires_grad=True)
    wanted = [x, *adapter.trainable()]
    results = []
    for swap, option in ((take_ops_out, BlockOption.KEEP), *((put_ops_in, option) for option in GRADES)):
        swap(pipe.transformer)
        found = {type(attn.processor) for attn in pipe.transformer.modules() if hasattr(attn, "set_processor")}
        assert (processor in found) == (swap is put_ops_in)
        with apply_options({"*": option}, blocks_of(adapter.denoiser, adapter.step_groups())):
            y = adapter.predict(x, torch.tensor(300.0), cond)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted, materialize_grads=True)])
        monkeypatch.setattr(processor.__base__, "__call__", None)  # the lean one must not fall back to it
    for lean in results[1:]:
        for lean_value, value in zip(lean, results[0], strict=True):
            assert (lean_value - value).abs().max() <= 1e-4 * value.abs().max()


def test_decoder_values_stay(tiny_sd):
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    results = []
    for swap in (take_ops_out, put_ops_in):
        swap(tiny_sd.vae)
        y = tiny_sd.vae.decode(x).sample
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
    for lean_value, value in zip(*reversed(results), strict=True):
        assert (lean_value - value).abs().max() <= 1e-4 * value.abs().max()


class Convolutions(TorchDispatchMode):
    """Notes for each convolution whether it has a bias."""

    def __init__(self):
        super().__init__()
        self.biased = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.convolution:
            self.biased.append(args[2] is not None)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapted", [False, True])
def test_the_bias_before_a_norm_goes_with_the_time_embedding(adapted):
    """Only the second convolution adds its own bias, in one pass over the image less; a LoRA layer keeps its own."""
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=32, temb_channels=8, groups=8)
    if adapted:
        block = inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False), block)
    block.requires_grad_(False)
    x, temb = torch.randn(2, 32, 5, 4, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    results, biased = [], []
    for swap in (take_ops_out, put_ops_in):
        swap(block)
        with Convolutions() as convolutions:
            y = block(x, temb)
        biased.append(convolutions.biased)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, temb))))
    # LoRA's two convolutions have none.
    assert biased == ([[True, False, False, True]] * 2 if adapted else [[True, True], [False, True]])
    for lean_value, value in zip(*reversed(results), strict=True):
        assert (lean_value - value).abs().max() <= 1e-5 * value.abs().max()


def test_all_of_a_decoder_is_lean(tiny_sd, monkeypatch):
    """Its blocks call their norm "group" and its attention is over an image; neither may take the stock path."""
    put_ops_in(tiny_sd.vae)
    for stock in (ResnetBlock2D, nn.GroupNorm):
        monkeypatch.setattr(stock, "forward", None)
    monkeypatch.setattr(AttnProcessor2_0, "__call__", None)
    assert tiny_sd.vae.decode(torch.randn(1, 4, 8, 8)).sample.isfinite().all()
    take_ops_out(tiny_sd.vae)
    assert type(tiny_sd.vae.decoder.mid_block.attentions[0].processor) is AttnProcessor2_0


def test_names_state_and_copies_stay(unet):
    before = copy.deepcopy(unet.state_dict())
    names = [name for name, _ in unet.named_parameters()]
    types = [type(module) for module in unet.modules()]
    put_ops_in(unet)
    put_ops_in(unet)
    twin = copy.deepcopy(unet)
    assert [name for name, _ in unet.named_parameters()] == names
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    take_ops_out(unet)
    assert [type(module) for module in unet.modules()] == types
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert not any("reused_as" in vars(module) for module in unet.modules())
    assert any(isinstance(module, FrozenConv2d) for module in twin.modules())


def test_less_is_kept(unet):
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    peaks = []
    for swap in (take_ops_out, put_ops_in):
        swap(unet)
        with PeakMeter(torch.device("cpu")) as meter:
            run(unet, x)
        peaks.append(meter.peak_bytes)
    # 0.69 on widths 64/128/256 at latent 32; the transformer's share is larger here.
    assert peaks[1] < 0.85 * peaks[0]


def test_learning_weights_and_autocast_take_the_stock_path(unet):
    put_ops_in(unet)
    unet.requires_grad_(True)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    assert all(g is not None for g in run(unet, x))
    unet.requires_grad_(False)
    text = torch.randn(2, 77, unet.config.cross_attention_dim)
    with torch.autocast("cpu", torch.bfloat16):
        y = unet(x, torch.tensor(300), text).sample
    y.float().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("option", "per_token"),
    [*zip(GRADES, (19, 17, 9, 5, 3, 1), strict=True)],
)
def test_a_transformer_block_keeps_what_its_option_says(option, per_token):
    """Elements per token of a block of width C, in units of C; within 3 %."""
    batch, tokens, text, width, heads = 2, 512, 77, 320, 5
    block = BasicTransformerBlock(width, heads, width // heads, cross_attention_dim=64).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), block)
    root = nn.ModuleList([block])
    put_ops_in(root)
    x = torch.randn(batch, tokens, width, requires_grad=True)
    words = torch.randn(batch, text, 64)
    with PeakMeter(torch.device("cpu")) as meter, apply_options({"*": option}, [Block("b", block, "transformers")]):
        # The clone is the block's input, made inside so that it counts.
        y = block(x.clone(), encoder_hidden_states=words)
        kept_bytes = meter.live_bytes() - y.numel() * y.element_size()
    per_batch = per_token * tokens * width
    per_batch += 2 * tokens * heads if option != "recompute" else 0  # logsumexp of both attentions
    per_batch += 2 * text * width if option in ("keep", "norms", "geglu") else 0  # k and v of the text
    assert kept_bytes == pytest.approx(4 * batch * per_batch, rel=0.03)


def test_several_adapters_and_those_that_the_op_does_not_cover(tiny_sd):
    """Two adapters at once, DoRA, dropout and switched-off adapters give what PEFT gives."""
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    unet = tiny_sd.unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "one")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False), "two")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], use_dora=True), "dora")
    unet.set_adapters(["one", "two", "dora"], [1.0, 0.5, 1.0])
    for switch in (unet.enable_adapters, unet.disable_adapters):
        switch()
        take_ops_out(unet)
        stock = unet(x, torch.tensor(300), torch.ones(2, 77, unet.config.cross_attention_dim)).sample
        put_ops_in(unet)
        lean = unet(x, torch.tensor(300), torch.ones(2, 77, unet.config.cross_attention_dim)).sample
        assert (lean - stock).abs().max() <= 1e-5 * stock.abs().max()
