"""Krea 2's layers with this package's ops beside diffusers', where the models that draw pictures do not test them."""

from copy import deepcopy

import pytest
import torch
from diffusers.models.transformers.transformer_krea2 import Krea2RMSNorm, Krea2TextFusionBlock, Krea2TransformerBlock

import alignprop_fast.models.lean.krea2  # noqa: F401  # enters its layers
from alignprop_fast.models.lean.surgery import put_ops_in

WIDTH = 32


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = Krea2TransformerBlock(WIDTH, 64, num_heads=4, num_kv_heads=2, norm_eps=1e-5)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.requires_grad_(False)


def with_ops(block):
    lean = deepcopy(block)
    put_ops_in(lean)
    return lean


def run(block, *inputs):
    """The result, and the gradient of the first input."""
    x = inputs[0].detach().requires_grad_()
    y = block(x, *inputs[1:])
    return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


def test_norms_in_fp32_of_a_block_in_bf16(block):
    """Error against float64: at most twice that of diffusers' block, plus 1e-3 of the largest element."""
    x, time = torch.randn(2, 5, WIDTH), torch.randn(2, 1, 6 * WIDTH)
    angles = torch.rand(5, 4).repeat_interleave(2, -1)
    angles = angles.cos(), angles.sin()
    half = deepcopy(block).bfloat16()
    for module, exact in zip(half.modules(), block.modules(), strict=True):
        if isinstance(module, Krea2RMSNorm):
            module.weight.data = exact.weight.data
    wide = deepcopy(block).double()
    for module, rounded in zip(wide.parameters(), half.parameters(), strict=True):
        module.data = rounded.data.double()
    x, time = x.bfloat16(), time.bfloat16()
    theirs, ours = (run(one, x, time, angles) for one in (half, with_ops(half)))
    exact = run(with_ops(wide), x.double(), time.double(), angles)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-3 * c.abs().max()


def test_a_mask_of_diffusers_with_padding_between_tokens(block):
    """Such as in the pipeline's own call, which pads texts before the image and before the chat's last marks."""
    x, time = torch.randn(2, 5, WIDTH), torch.randn(2, 1, 6 * WIDTH)
    mask = torch.tensor([[True, False, False, True, True], [True] * 5])[:, None, None]
    fusion = Krea2TextFusionBlock(WIDTH, 4, 2, 64, 1e-5).requires_grad_(False)
    for one, rest in ((block, (time, None)), (fusion, ())):
        theirs, ours = (run(each, x, *rest, mask) for each in (one, with_ops(one)))
        # fp32, in another order of sums.
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
