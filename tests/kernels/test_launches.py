"""The Triton launches of attention and lora_linear equal the op.

Tolerance: fp32 products of at most 64 terms in another order; measured 1e-6, asserted at 1e-5.
"""

import pytest
import torch

pytest.importorskip("triton")

from alignprop_fast.ops import attention_triton, autotune, lora_linear_trials, lora_linear_triton
from alignprop_fast.ops.attention import attention
from alignprop_fast.ops.lora_linear import lora_linears
from alignprop_fast.ops.lora_linear_plain import Layer, plain_outputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def make_layers():
    """q, k, v of one attention: one layer without bias, one with another width and rank."""
    return [
        Layer(randn(24, 40), None, randn(4, 40), randn(24, 4), 0.5),
        Layer(randn(32, 40), randn(32), randn(8, 40), randn(32, 8), 2.0),
        Layer(randn(24, 40), randn(24), randn(4, 40), randn(24, 4), 1.0),
    ]


def test_lora_linear_by_the_kernels_equals_plain():
    x, layers = randn(2, 9, 40).requires_grad_(), make_layers()
    for layer in layers:
        layer.down.requires_grad_()
        layer.up.requires_grad_()
    ys = lora_linears(x, layers)
    for fused, plain in zip(lora_linear_triton.prepared_forward(x, layers)(x, layers), ys, strict=True):
        # Sums of 40 products in another order: to the largest element, since one may be near zero.
        assert (fused - plain).abs().max() <= 1e-5 * plain.abs().max()
    gs = [torch.ones_like(y) * (p + 1) for p, y in enumerate(ys)]
    wanted = [x, *(layer.down for layer in layers), *(layer.up for layer in layers)]
    dx, d_downs, d_ups = lora_linear_triton.run_backward(gs, x, layers, True)
    for fused, plain in zip((dx, *d_downs, *d_ups), torch.autograd.grad(ys, wanted, gs), strict=True):
        assert (fused - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_what_is_prepared_for_some_layers_does_not_serve_others(monkeypatch):
    monkeypatch.setattr(lora_linear_trials, "_fastest", lambda *arguments: "triton")
    monkeypatch.setattr(autotune, "_choices", {})
    x, layer = randn(3, 24), Layer(randn(16, 24), randn(16), randn(4, 24), randn(16, 4), 0.5)
    others = [layer._replace(scale=2.0), layer._replace(bias=None), layer._replace(up=layer.up.bfloat16())]
    for given, of in ((x, layer), (x.T.contiguous().T, layer), *((x, other) for other in others)):
        (y,) = lora_linears(given, [of])
        (plain,) = plain_outputs(given, [of])
        assert (y - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert len(autotune._choices) == 5


@pytest.mark.parametrize(
    "keys", [20, pytest.param(150, marks=pytest.mark.slow("more keys than a tile, in Triton's interpreter"))]
)
def test_attention_by_the_kernels_equals_the_op(keys):
    q, k, v = (randn(2, n, 3, 32).transpose(1, 2) for n in (40, keys, keys + 1))
    v = v[:, :, :keys]
    args = (q, k, v, 0.2)
    o, lse = attention_triton.forward(*args)
    learning = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = attention(*learning, 0.2)
    assert (o - expected).abs().max() <= 1e-5
    g = randn(2, 40, 3, 32).transpose(1, 2)
    grads = attention_triton.backward(g, q, k, v, o, lse, 0.2)
    for fused, plain in zip(grads, torch.autograd.grad(expected, learning, g), strict=True):
        assert (fused - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_what_the_kernels_do_not_serve_goes_the_plain_way():
    x, layers = randn(9, 40), make_layers()
    frozen = [Layer(layers[0].weight)]
    for given, of in ((x, frozen), (x.double(), layers), (x.cpu(), layers)):
        assert lora_linear_trials.forward(given, of) is plain_outputs
        assert lora_linear_trials.backward(given, of) == "plain"
