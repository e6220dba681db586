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
from torch.utils._python_dispatch import TorchDispatchMode

import alignprop_fast.models.flux
import alignprop_fast.models.flux2
import alignprop_fast.models.stable_diffusion_3
import alignprop_fast.models.z_image  # noqa: F401
from alignprop_fast.models.lean.surgery import put_ops_in
from alignprop_fast.planner import GRADES
from alignprop_fast.runtime import Block, LiveBytes, apply_options

WIDTH, HEAD = 192, 64
# Image and text tokens. On the meta device so many that modulations and adapters do not count.
TOKENS = {"meta": (1536, 512), "cpu": (24, 8)}
HEADS = WIDTH // HEAD


def rotation(image, text):
    return tuple(torch.ones(image.shape[1] + text.shape[1], HEAD, device=image.device) for _ in range(2))


def streams(image, text, modulation):
    return image, text, modulation(WIDTH)[:, 0], rotation(image, text)


def streams_of_flux2(image, text, modulation):
    return image, text, modulation(6 * WIDTH), modulation(6 * WIDTH), rotation(image, text)


def one_stream_of_flux2(image, text, modulation):
    return torch.cat([text, image], dim=1), None, modulation(3 * WIDTH), rotation(image, text)


def one_stream_of_z_image(image, text, modulation):
    x = torch.cat([image, text], dim=1)
    angles = torch.ones(1, x.shape[1], HEAD // 2, dtype=torch.complex64, device=x.device)
    return x, None, angles, modulation(min(WIDTH, 256))[:, 0]


def streams_of_sd3(image, text, modulation):
    return image, text, modulation(WIDTH)[:, 0]


# name -> (block, its arguments, elements kept per token in units of the width, from keep to recompute)
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
    """The block with adapters on its attention and the package's ops."""
    with torch.device(device):
        block = BLOCKS[name][0]().requires_grad_(False)
        linears = [key for key, module in block.named_modules() if isinstance(module, nn.Linear)]
        targets = [key for key in linears if ".to_" in f".{key}" or ".add_" in f".{key}"]
        root = nn.ModuleList([inject_adapter_in_model(LoraConfig(r=4, target_modules=targets), block)])
    put_ops_in(root)
    return root[0]


def run(name, block, device, option):
    """The block's results, its inputs that learn, and the bytes that it keeps."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(1, *shape, generator=generator).to(device)

    streams = [draw(tokens, WIDTH).requires_grad_() for tokens in TOKENS[device]]
    given = BLOCKS[name][1](*streams, lambda width: draw(1, width))
    with LiveBytes() as live, apply_options({"*": option}, [Block("b", block, "transformers")]):
        # The clones are the block's inputs, made inside so that they count.
        out = block(*(x.clone() if isinstance(x, torch.Tensor) and x.requires_grad else x for x in given))
        out = out if isinstance(out, tuple) else (out,)
        results = {id(y.untyped_storage()): y.untyped_storage().nbytes() for y in out}
        kept_bytes = live.live_bytes - sum(results.values())
    return out, streams, kept_bytes


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_keeps_what_its_option_says(name):
    """Elements per token of a block of width C, in units of C; within 3 %, for logsumexp, statistics and adapters."""
    block, tokens = adapted(name, "meta"), sum(TOKENS["meta"])
    for option, per_token in zip(GRADES, BLOCKS[name][2], strict=True):
        _, _, kept_bytes = run(name, block, "meta", option)
        assert kept_bytes / (4 * tokens * WIDTH) == pytest.approx(per_token, rel=0.03), option


class Uses(TorchDispatchMode):
    """Counts the operators that read a weight."""

    def __init__(self, weight):
        super().__init__()
        self.address, self.count = weight.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and any(
            isinstance(t, torch.Tensor) and t.data_ptr() == self.address for t in args
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "last", "again"),
    [
        ("FLUX.1 single", "proj_out", 0),
        ("FLUX.1 double", "ff.net.2", 0),
        ("FLUX.2 single", "attn.to_out.base_layer", 1),
    ],
)
def test_the_last_product_runs_again_only_for_an_adapter(name, last, again):
    block = adapted(name, "cpu")
    with Uses(block.get_submodule(last).weight) as uses:
        out, inputs, _ = run(name, block, "cpu", GRADES[-1])
        grads = torch.autograd.grad([y.sum() for y in out], inputs)
    assert uses.count == 2 + again, "once forward and once for the gradient of its input"
    assert all(g.isfinite().all() for g in grads)
