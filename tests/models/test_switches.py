"""Features switched on in a pipeline: exact against autograd through diffusers' own call, or refused."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    FirstBlockCacheConfig,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch import nn

from alignprop_fast import DifferentiableSampler
from alignprop_fast.models import adapt
from alignprop_fast.models.conditioning import PromptBatch

from ..loadable import Format

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    format: Format
    on: Callable[[Any], Any]  # switches it on
    off: Callable[[Any], Any] | None = None  # the call that the refusal names, if it is one call
    kind: str = "tiny_sd"


CASES: list[Case] = []


def refused(name, words, on, off=None, kind="tiny_sd"):
    CASES.append(Case(Format(name, "refused", words), on, off, kind))


def exact(name, on, kind="tiny_sd"):
    CASES.append(Case(Format(name, "read exactly"), on, None, kind))


def set_part(pipe, **parts):
    pipe.register_modules(**{name: part.requires_grad_(False).eval() for name, part in parts.items()})


def tiny_vae(pipe):
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    set_part(pipe, vae=AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)))


def other_vae(pipe):
    blocks = {"encoder_down_block_types": ("DownEncoderBlock2D",), "encoder_block_out_channels": (8,)}
    blocks |= {"decoder_down_block_types": ("ResnetDownsampleBlock2D",), "decoder_block_out_channels": (8,)}
    blocks |= {"decoder_up_block_types": ("ResnetUpsampleBlock2D",)}
    norms = {"encoder_norm_num_groups": 4, "decoder_norm_num_groups": 4}
    set_part(pipe, vae=ConsistencyDecoderVAE(**blocks, **norms))


def changed_unet(**settings):
    def put(pipe):
        torch.manual_seed(0)
        set_part(pipe, unet=UNet2DConditionModel.from_config({**pipe.unet.config, **settings}))

    return put


def changed_vae(**settings):
    def put(pipe):
        torch.manual_seed(0)
        set_part(pipe, vae=AutoencoderKL.from_config({**pipe.vae.config, **settings}))

    return put


def new_word(pipe):
    """A learned token of two vectors, as load_textual_inversion puts it in."""
    width = pipe.text_encoder.config.hidden_size
    pipe.load_textual_inversion(torch.randn(2, width, generator=torch.Generator().manual_seed(3)), token="<red>")


def to_q(pipe):
    return next(module for name, module in pipe.unet.named_modules() if name.endswith("to_q"))


def in_4_bit(pipe):
    import bitsandbytes

    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q = bitsandbytes.nn.Linear4bit(attention.to_q.in_features, attention.to_q.out_features)


def hook(pipe):
    to_q(pipe).register_forward_hook(lambda module, inputs, output: 2 * output)


def patched(module):
    forward = module.forward
    module.forward = lambda *arguments, **named: 2 * forward(*arguments, **named)


def compiled(name):
    def put(pipe):
        pipe.register_modules(**{name: torch.compile(getattr(pipe, name), backend="eager")})

    return put


def undo_compile(pipe):
    pipe.unet = pipe.unet._orig_mod


def fused_lora(pipe):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.fuse_lora()


def no_hooks(pipe):
    pipe.remove_all_hooks()
    pipe.to(CPU)


PROJECTED = changed_unet(encoder_hid_dim=32, encoder_hid_dim_type="text_proj", cross_attention_dim=48)
ANEW = "load the pipeline again without it"
refused(
    "gradient checkpointing",
    "pipe.unet.disable_gradient_checkpointing()",
    lambda pipe: pipe.unet.enable_gradient_checkpointing(),
    lambda pipe: pipe.unet.disable_gradient_checkpointing(),
)
refused("`torch.compile` of the denoiser", "pipe.unet = pipe.unet._orig_mod", compiled("unet"), undo_compile)
refused("`torch.compile` of the VAE", "pipe.vae = pipe.vae._orig_mod", compiled("vae"))
refused("`pipe.unet.compile()`", f"compile(), which the sampler does not support: {ANEW}", lambda p: p.unet.compile())
refused("`compile_repeated_blocks()`", ANEW, lambda pipe: pipe.unet.compile_repeated_blocks())
refused(
    "`pipe.vae.decode = torch.compile(pipe.vae.decode)`",
    f"remove it, or {ANEW}",
    lambda pipe: setattr(pipe.vae, "decode", torch.compile(pipe.vae.decode)),
    lambda pipe: delattr(pipe.vae, "decode"),
)
refused(
    "VAE tiling",
    "pipe.vae.disable_tiling()",
    lambda pipe: pipe.vae.enable_tiling(),
    lambda pipe: pipe.vae.disable_tiling(),
)
refused(
    "VAE slicing",
    "pipe.vae.disable_slicing()",
    lambda pipe: pipe.vae.enable_slicing(),
    lambda pipe: pipe.vae.disable_slicing(),
)
refused(
    "fused projections",
    "pipe.unet.unfuse_qkv_projections()",
    lambda pipe: pipe.fuse_qkv_projections(),
    lambda pipe: (pipe.unet.unfuse_qkv_projections(), pipe.vae.unfuse_qkv_projections()),
)
refused(
    "fused projections of FLUX",
    "pipe.transformer.unfuse_qkv_projections()",
    lambda pipe: pipe.transformer.fuse_qkv_projections(),
    lambda pipe: pipe.transformer.unfuse_qkv_projections(),
    "tiny_flux",
)
refused("`fuse_lora()`", "pipe.unfuse_lora()", fused_lora, lambda pipe: pipe.unfuse_lora())
refused(
    "`enable_model_cpu_offload()`",
    "pipe.remove_all_hooks()",
    lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    no_hooks,
)
refused(
    "`enable_sequential_cpu_offload()`",
    "pipe.remove_all_hooks()",
    lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
)
refused(
    "group offload",
    f"group offload, which the sampler does not support: {ANEW}",
    lambda pipe: pipe.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level"),
)
refused(
    "layerwise casting",
    'base_dtype="fp8" stores weights in 8 bits',
    lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
)
refused(
    "a cache between steps (first block, PAB, FasterCache, ...)",
    "pipe.transformer.disable_cache()",
    lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2)),
    lambda pipe: pipe.transformer.disable_cache(),
    "tiny_flux",
)
refused("forward hooks", "call remove() on their handles", hook)
refused("a patched forward (DeepCache, LyCORIS)", f"remove it, or {ANEW}", lambda pipe: patched(to_q(pipe)))
refused("token merging (ToMe)", "tomesd.remove_patch(pipe)", lambda pipe: setattr(pipe.unet, "_tome_info", {}))
refused(
    "`DataParallel`",
    "pipe.unet = pipe.unet.module",
    lambda pipe: pipe.register_modules(unet=nn.DataParallel(pipe.unet)),
)
refused(
    "IP-Adapter",
    "pipe.unload_ip_adapter()",
    lambda pipe: pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj"),
)
refused("weights of bitsandbytes, torchao, quanto or GGUF", 'base_dtype="nf4", "int8" or "fp8" quantises it', in_4_bit)
refused("LCM's embedded guidance", "use the model that it was distilled from", changed_unet(time_cond_proj_dim=32))
refused("a UNet of classes", "use a model that draws only from text", changed_unet(num_class_embeds=4))
refused("another VAE (consistency decoder)", "pipe.vae = AutoencoderKL.from_pretrained(...)", other_vae)
refused("a part on another device", "pipe.to(device)", lambda pipe: pipe.vae.to("meta"))
exact("attention slicing", lambda pipe: pipe.enable_attention_slicing(1))
exact("other attention processors", lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()))
exact("`set_attention_backend()`", lambda pipe: pipe.transformer.set_attention_backend("_native_math"), "tiny_flux")
exact("FreeU", lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6))
exact("textual inversion", new_word)
exact("a tiny VAE (TAESD)", tiny_vae)
exact("a VAE with a shift that SD's pipeline ignores", changed_vae(shift_factor=0.3))
exact("text projected by the UNet", PROJECTED)

FORMATS = [case.format for case in CASES]


def named(*answers):
    return [pytest.param(case, id=case.format.name) for case in CASES if case.format.answer in answers]


@pytest.mark.parametrize("case", named("refused"))
def test_refused_with_the_call_that_undoes_it(case, request):
    pipe = request.getfixturevalue(case.kind)
    case.on(pipe)
    with pytest.raises(ValueError) as error:
        DifferentiableSampler(pipe, 2, height=16, width=16)
    assert case.format.words in str(error.value) and "\n" not in str(error.value)
    assert not any(type(module).__module__.startswith("alignprop_fast") for module in pipe.vae.modules())  # untouched
    if case.off is not None:
        case.off(pipe)
        adapt(pipe)


def add_adapters(pipe):
    denoiser = pipe.unet if "unet" in pipe.components else pipe.transformer
    denoiser.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(1)
    parameters = {name: one for name, one in denoiser.named_parameters() if one.requires_grad}
    for parameter in parameters.values():
        parameter.data.normal_(std=0.2, generator=generator)
    return parameters


def gradients(images, parameters):
    for parameter in parameters.values():
        parameter.grad = None
    ramp = torch.linspace(-1, 2, images[0].numel()).reshape(images[0].shape)
    (images * ramp).sin().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


PROMPTS, SETTINGS = ["a <red> cat", "dog"], {"num_inference_steps": 2, "guidance_scale": 5.0}


def diffusers_images(pipe, **settings):
    """The gradients of the pipeline's own call with autograd on, which its decorator switches off."""
    call = type(pipe).__call__
    while hasattr(call, "__wrapped__"):
        call = call.__wrapped__
    settings = {**SETTINGS, "generator": torch.Generator().manual_seed(5), "output_type": "pt", **settings}
    return call(pipe, PROMPTS, **settings).images


def our_images(pipe, **size):
    sampler = DifferentiableSampler(pipe, *SETTINGS.values(), 0.0, **size)
    return sampler(PROMPTS, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("case", named("read exactly"))
def test_exact_against_autograd_through_diffusers(case, request):
    """Within 1e-4 of the largest gradient, which covers fp32 rounding through a chain of two steps."""
    pipe = request.getfixturevalue(case.kind)
    case.on(pipe)
    size = {"height": 16, "width": 16}
    parameters = add_adapters(pipe)
    theirs = diffusers_images(pipe, **size)
    theirs_grads = gradients(theirs, parameters)
    ours = our_images(pipe, **size)
    assert (ours - theirs).abs().max() < 1e-5
    for name, grad in gradients(ours, parameters).items():
        assert theirs_grads[name].abs().max() > 0
        assert (grad - theirs_grads[name]).abs().max() <= 1e-4 * theirs_grads[name].abs().max(), name


@pytest.mark.parametrize("sample_size", [[8, 16], None])
def test_the_size_of_the_models_configuration(tiny_sd, sample_size):
    changed_unet(sample_size=sample_size)(tiny_sd)
    pipe = StableDiffusionPipeline(**tiny_sd.components, requires_safety_checker=False)  # looks at it when it is made
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        if sample_size is None:
            with pytest.raises(ValueError, match="has no sample_size: give height and width"):
                our_images(pipe)
        size = {"height": 16, "width": 32} if sample_size is None else {}
        ours, theirs = our_images(pipe, **size), diffusers_images(pipe, **size)
    assert ours.shape == (2, 3, 16, 32) and (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("tiny_sd", "text_encoder"),
        ("tiny_sdxl", "text_encoder"),
        ("tiny_sd3", "text_encoder_2"),
        ("tiny_flux", "tokenizer_2"),
    ],
)
def test_prompts_without_what_encodes_them(kind, part, request):
    pipe = request.getfixturevalue(kind)
    pipe.register_modules(**{part: None})
    with pytest.raises(ValueError, match=f"the pipeline has no {part}, which encodes prompts"):
        our_images(pipe, height=16, width=16)


def test_a_text_encoder_on_another_device(tiny_sd):
    tiny_sd.text_encoder.to("meta")
    with pytest.raises(ValueError, match=r"pipe.text_encoder is on meta, the denoiser on cpu: use pipe.to\('cpu'\)"):
        our_images(tiny_sd)


def test_text_encoders_of_another_dtype(tiny_sd):
    """diffusers itself stops there; here the embeddings are used as given, in the denoiser's dtype."""
    tiny_sd.text_encoder.to(torch.bfloat16)
    with contextlib.suppress(RuntimeError):
        diffusers_images(tiny_sd)
        raise AssertionError("diffusers reads it now: compare")
    cond, uncond = tiny_sd.encode_prompt(PROMPTS, "cpu", 1, True)
    pipe = StableDiffusionPipeline(**{**tiny_sd.components, "text_encoder": None}, requires_safety_checker=False)
    embeds = {"prompt_embeds": cond.float(), "negative_prompt_embeds": uncond.float()}
    call = StableDiffusionPipeline.__call__.__wrapped__
    with torch.no_grad():
        settings = {**SETTINGS, "generator": torch.Generator().manual_seed(5), "output_type": "pt"}
        theirs = call(pipe, None, **settings, **embeds).images
        assert (our_images(tiny_sd) - theirs).abs().max() < 1e-5


def test_what_a_memory_budget_asks_of_a_tiny_vae_and_of_projected_text(tiny_sd):
    tiny_vae(tiny_sd)
    PROJECTED(tiny_sd)
    model = adapt(tiny_sd)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.decode_by_bands(x), model.decode(x)) and not model.decoder_groups()["decoder"]
    blank = model.blank_conditioning(2, True, (16, 16))
    cond = model.encode(PromptBatch(PROMPTS, None, True, (16, 16)))
    assert blank.embeds.shape == cond.embeds.shape


def test_a_pipeline_that_draws_in_a_way_of_its_own(tiny_sd):
    class Mine(StableDiffusionPipeline):
        def __call__(self, prompt):
            return None

    with pytest.raises(ValueError, match=r"Mine draws in its own way: use StableDiffusionPipeline\(\*\*pipe\."):
        adapt(Mine(**tiny_sd.components, requires_safety_checker=False))
