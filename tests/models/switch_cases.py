"""What users switch on in a pipeline, and whether it is refused or read exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    FirstBlockCacheConfig,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch import nn

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
