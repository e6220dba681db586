"""What an op starts outside tracing: its kernels, once each, and nothing else. No custom operator, cast or copy."""

from functools import partial

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

pytest.importorskip("triton")

from alignprop_fast.models import adapt
from alignprop_fast.models.conditioning import PromptBatch
from alignprop_fast.models.lean.surgery import put_ops_in
from alignprop_fast.ops.activation import geglu
from alignprop_fast.ops.guided_step import guided_step
from alignprop_fast.ops.layer_norm import layer_norm
from alignprop_fast.ops.lora_linear import lora_linears
from alignprop_fast.ops.lora_linear_plain import Layer
from benchmarks.step.calls import Calls, as_on_a_gpu, floor_bytes

# The norms of groups are counted as their own kernels.
pytestmark = pytest.mark.usefixtures("compiled_kernels")


def calls_of(run, products="triton"):
    calls = Calls()
    with as_on_a_gpu(calls, products), calls:
        run()
    return dict(calls.counts)


def both(y, wanted):
    torch.autograd.grad(y, wanted, [torch.empty_like(one) for one in y])


def layers():
    """q, k, v whose A are views of one matrix. Like copies of adapters they take gradients of any dtype."""
    stacked = torch.randn(12, 16, dtype=torch.bfloat16).split(4)
    pairs = [(down.requires_grad_(), torch.randn(8, 4, dtype=down.dtype, requires_grad=True)) for down in stacked]
    for down, up in pairs:
        down.grad_dtype = up.grad_dtype = None
    return [Layer(torch.randn(8, 16, dtype=torch.bfloat16), None, down, up) for down, up in pairs]


def test_norm_activation_and_step():
    x, gamma = torch.randn(2, 3, 8, requires_grad=True), torch.ones(8)
    names = ("norm_modulate_forward_kernel", "norm_modulate_backward_kernel")
    assert calls_of(lambda: both([layer_norm(x, gamma, gamma)], [x])) == dict.fromkeys(names, 1)
    assert calls_of(lambda: layer_norm(x.detach(), gamma, gamma)) == {names[0]: 1}
    names = ("activation_forward_kernel", "activation_backward_kernel")
    assert calls_of(lambda: both([geglu(x)], [x])) == dict.fromkeys(names, 1)
    latents, y = torch.ones(2, 4), torch.ones(4, 4)
    assert calls_of(lambda: guided_step(latents, y, None, 0.9, [-4.0, 5.0])) == {"guided_step_kernel": 1}


def test_three_projections_by_kernels():
    x, qkv = torch.randn(2, 3, 16, dtype=torch.bfloat16, requires_grad=True), layers()
    found = calls_of(lambda: both(lora_linears(x, qkv), [x, *(t for layer in qkv for t in layer[2:4])]))
    narrow = 1 + 1 + 3  # x A^T, again for the gradient of B, and the gradient of each
    grad = 1 + 3  # of A, which is one matrix, and of each B
    products = {"lora_product_kernel": 1, "lora_input_grad_kernel": 1}
    assert found == products | {"lora_narrow_kernel": narrow, "lora_grad_kernel": grad, "lora_sum_kernel": 1}


def test_three_projections_by_products():
    x, qkv = torch.randn(2, 3, 16, dtype=torch.bfloat16, requires_grad=True), layers()
    found = calls_of(lambda: both(lora_linears(x, qkv), [x, *(t for layer in qkv for t in layer[2:4])]), "plain")
    # Forward x A^T, and for each x W^T and += t B^T; back g B, g^T t for each, x A^T, u^T x, and g W as sums.
    assert found == {"mm": 1 + 3 + 3 + 3 + 1 + 1 + 1, "addmm_": 3 + 2 + 1}


def test_the_norms_of_a_unet_block_add_the_branches_before_them():
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=8).requires_grad_(False)
    put_ops_in(nn.ModuleList([block]))
    x, text = torch.randn(1, 4, 16, requires_grad=True), torch.randn(1, 3, 8)
    found = calls_of(lambda: both([block(x, encoder_hidden_states=text)], [x]))
    assert found["norm_modulate_forward_kernel"] == found["norm_modulate_backward_kernel"] == 3
    # Forward the feed-forward part, and back the gradients of the input of the block, and of q, k and v.
    assert found["add"] == 1 + 1 + 2


def test_the_floor_is_what_products_and_attention_leave(tiny_flux):
    model, size = adapt(tiny_flux), (16, 16)
    cond = model.encode(PromptBatch(["red cat"], None, False, size))
    x, config = torch.randn(1, *model.latent_shape(size)), model.denoiser.config
    found = floor_bytes(model, partial(model.predict, x, torch.tensor(300.0), cond))
    tokens, heads = cond.embeds.shape[1] + x[0, 0].numel() // 4, config.num_attention_heads
    # Double-stream: input, q, k, v, output of the attention and its projection, 4 of the feed-forward part; else 9.
    widths = 10 * config.num_layers + 9 * config.num_single_layers
    logsumexps = config.num_layers + config.num_single_layers
    assert found == 4 * tokens * heads * (widths * config.attention_head_dim + logsumexps)
