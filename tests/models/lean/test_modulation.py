"""What blocks of joint and single-stream transformers keep under each option, counted on meta tensors; what runs twice.

Values and gradients of these blocks are tested in whole models, in test_surgery.py.
"""

import pytest
import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import alignprop_fast.models.flux
import alignprop_fast.models.flux2
import alignprop_fast.models.stable_diffusion_3
import alignprop_fast.models.z_image  # noqa: F401
from alignprop_fast.models.lean.surgery import put_ops_in
from alignprop_fast.planner import GRADES
from alignprop_fast.runtime import Block, LiveBytes, apply_options

IMAGE, TEXT, WIDTH, HEAD = 96, 32, 192, 64
HEADS = WIDTH // HEAD
TARGETS = r".*\.(to_[qkv]|to_out(\.0)?|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)"


def rotation(like):
    return tuple(torch.ones(IMAGE + TEXT, HEAD, device=like.device) for _ in range(2))


def streams(block, image, text, modulation):
    return block(image, text, modulation(WIDTH)[:, 0], rotation(image))


def streams_of_flux2(block, image, text, modulation):
    return block(image, text, modulation(6 * WIDTH), modulation(6 * WIDTH), rotation(image))


def one_stream_of_flux2(block, image, text, modulation):
    return block(torch.cat([text, image], dim=1), None, modulation(3 * WIDTH), rotation(image))


def one_stream_of_z_image(block, image, text, modulation):
    x = torch.cat([image, text], dim=1)
    angles = torch.ones(1, IMAGE + TEXT, HEAD // 2, dtype=torch.complex64, device=x.device)
    return block(x, None, angles, modulation(min(WIDTH, 256))[:, 0])


def streams_of_sd3(block, image, text, modulation):
    return block(image, text, modulation(WIDTH)[:, 0])


# name -> (block, how it runs, elements kept per token in units of the width, from keep to recompute)
BLOCKS = {
    "FLUX.1 double": (lambda: FluxTransformerBlock(WIDTH, HEADS, HEAD), streams, (11, 10, 6, 3, 2, 1)),
    "FLUX.1 single": (lambda: FluxSingleTransformerBlock(WIDTH, HEADS, HEAD), streams, (10, 9, 5, 2, 2, 1)),
    "FLUX.2 double": (lambda: Flux2TransformerBlock(WIDTH, HEADS, HEAD), streams_of_flux2, (13, 12, 6, 3, 2, 1)),
    "FLUX.2 single": (
        lambda: Flux2SingleTransformerBlock(WIDTH, HEADS, HEAD),
        one_stream_of_flux2,
        (16, 12, 12, 3, 2, 1),
    ),
    "Z-Image": (
        lambda: ZImageTransformerBlock(0, WIDTH, HEADS, HEADS, 1e-5, True),
        one_stream_of_z_image,
        (43 / 3, 37 / 3, 7, 4, 2, 1),
    ),
    "SD3.5": (
        lambda: JointTransformerBlock(WIDTH, HEADS, HEAD, qk_norm="rms_norm"),
        streams_of_sd3,
        (11, 10, 6, 3, 2, 1),
    ),
}


def adapted(name, device):
    with torch.device(device):
        block = BLOCKS[name][0]().requires_grad_(False)
        root = nn.ModuleList([inject_adapter_in_model(LoraConfig(r=4, target_modules=TARGETS), block)])
    put_ops_in(root)
    return root[0]


def run(name, block, device, option):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        x = torch.randn(1, *shape, generator=generator)
        return torch.empty_like(x, device=device) if device == "meta" else x

    image, text = draw(IMAGE, WIDTH).requires_grad_(), draw(TEXT, WIDTH).requires_grad_()
    with LiveBytes() as live:
        # The clones are the block's inputs, made inside so that they count.
        with apply_options({"*": option}, [Block("b", block, "transformers")]):
            out = BLOCKS[name][1](block, image.clone(), text.clone(), lambda width: draw(1, width))
        out = out if isinstance(out, tuple) else (out,)
        results = {id(y.untyped_storage()): y.untyped_storage().nbytes() for y in out}
        kept_bytes = live.live_bytes - sum(results.values())
    return out, (image, text), kept_bytes


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_keeps_what_its_option_says(name):
    """Elements per token of a block of width C, in units of C; within 3 %, for logsumexp, statistics and adapters."""
    block, tokens = adapted(name, "meta"), IMAGE + TEXT
    for option, per_token in zip(GRADES, BLOCKS[name][2], strict=True):
        _, _, kept_bytes = run(name, block, "meta", option)
        assert kept_bytes / (4 * tokens * WIDTH) == pytest.approx(per_token, rel=0.03), option


@pytest.mark.parametrize(
    ("name", "last", "times"),
    [("FLUX.1 single", "proj_out", 1), ("FLUX.1 double", "ff.net.2", 1), ("FLUX.2 single", "attn.to_out", 2)],
)
def test_the_last_product_runs_again_only_for_an_adapter(name, last, times):
    block, calls = adapted(name, "cpu"), []
    block.get_submodule(last).register_forward_hook(lambda *called: calls.append(1))
    out, inputs, _ = run(name, block, "cpu", GRADES[-1])
    grads = torch.autograd.grad([y.sum() for y in out], inputs)
    assert len(calls) == times and all(g.isfinite().all() for g in grads)
