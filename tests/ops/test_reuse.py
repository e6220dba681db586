"""A repeated segment reuses results of its first run: they are computed once, with the same graph and numbers."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from alignprop_fast.ops.lora_linear import lora_linear
from alignprop_fast.ops.reuse import checkpoint_contexts

WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


def segment(x):
    """Two products that may be kept, between functions through which every number affects the result."""
    return lora_linear(lora_linear(x.sin(), WEIGHT, keep="qkv").tanh(), WEIGHT, keep="out").exp()


@pytest.mark.parametrize("kinds", [(), ("qkv",), ("qkv", "out")])
def test_gradients_stay_and_kept_products_run_once(kinds):
    x = torch.randn(5, 6, requires_grad=True)
    expected = torch.autograd.grad(segment(x).sum(), x)[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = checkpoint(
            segment, x, use_reentrant=False, context_fn=partial(checkpoint_contexts, kinds), early_stop=False
        )
        grad = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(grad, expected)
    forward = sum(event.name == "aten::linear" for event in profile.events())
    assert forward == 2 + 2 - len(kinds)


def test_outside_a_segment_nothing_is_stored():
    first, _ = checkpoint_contexts(("qkv",))
    lora_linear(torch.ones(2, 6), WEIGHT, keep="qkv")
    assert not first.results


def test_the_store_does_not_hold_the_graph():
    first, _ = checkpoint_contexts(("qkv",))
    with first:
        lora_linear(torch.ones(2, 6, requires_grad=True), WEIGHT, keep="qkv")
    assert first.results[0][0].grad_fn is None
