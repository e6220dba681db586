"""layer_norm: values and gradients against plain PyTorch, and the tensors it keeps.

Tolerance: error against the float64 reference at most twice that of plain PyTorch in the same dtype, plus 1e-6.
"""

import pytest
import torch

from alignprop_fast.ops.layer_norm import layer_norm, layer_norm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


def inputs(shape, scale=True, shift=True):
    """x, residual, two gradients, gamma, beta in float64."""
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = [shape] * 4 + [shape[-1:]] * 2
    *tensors, gamma, beta = (torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE) for s in shapes)
    return [*tensors, gamma if scale else None, beta if shift else None]


def run(tensors, residual, fused):
    x, r, g, h, gamma, beta = tensors
    x, r = (t.detach().requires_grad_() for t in (x, r))
    if not residual:
        y = layer_norm(x, gamma, beta, EPS) if fused else layer_norm_reference(x, gamma, beta, EPS)
        return y.detach(), *torch.autograd.grad(y, x, g)
    if fused:
        y, s = layer_norm(x, gamma, beta, EPS, r)
    else:
        s = x + r
        y = layer_norm_reference(s, gamma, beta, EPS)
    return y.detach(), s.detach(), *torch.autograd.grad([y, s], [x, r], [g, h])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("scale", "shift"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("shape", [(2, 7, 40), (1, 1, 2), (5, 129)])
def test_values_and_gradients(dtype, residual, scale, shift, shape):
    tensors = [None if t is None else t.to(dtype) for t in inputs(shape, scale, shift)]
    exact = run([None if t is None else t.double() for t in tensors], residual, False)
    for a, b, c in zip(run(tensors, residual, True), run(tensors, residual, False), exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


def test_gradcheck():
    x, r, _, _, gamma, beta = inputs((3, 4, 6))
    assert torch.autograd.gradcheck(lambda t: layer_norm(t, gamma, beta), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda t, u: layer_norm(t, gamma, beta, 1e-5, u), (x, r.requires_grad_()))


def test_one_of_the_two_outputs_may_go_unused():
    x, r, g, h, gamma, beta = inputs((4, 8))
    for pick, grad in ((0, g), (1, h)):
        t = x.clone().requires_grad_()
        ours = torch.autograd.grad(layer_norm(t, gamma, beta, EPS, r)[pick], t, grad)[0]
        plain = (layer_norm_reference(t + r, gamma, beta, EPS), t + r)[pick]
        assert torch.allclose(ours, torch.autograd.grad(plain, t, grad)[0], atol=1e-12)


def test_strided_input():
    x, _, g, _, gamma, beta = inputs((5, 3, 8))
    strided = x.transpose(0, 1).requires_grad_()
    y = layer_norm(strided, gamma, beta)
    assert torch.allclose(y, layer_norm_reference(x, gamma, beta, 1e-5).transpose(0, 1), atol=1e-12)
    one, two = (torch.autograd.grad(layer_norm(strided, gamma, beta), strided, g.transpose(0, 1))[0] for _ in "ab")
    assert torch.equal(one, two)


def test_the_sum_is_kept_no_more_than_two_numbers_a_token_and_inputs_left_alone():
    x, r, _, _, gamma, beta = (t.float() for t in inputs((6, 64)))
    before = x.clone(), r.clone()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, s = layer_norm(x.requires_grad_(), gamma, beta, 1e-5, r)
    large = [t for t in saved if t.numel() >= x.numel()]
    assert len(large) == 1 and large[0].data_ptr() == s.data_ptr()
    assert sum(t.numel() for t in saved) <= x.numel() + 2 * 6, "mean and rstd"
    assert torch.equal(x, before[0]) and torch.equal(r, before[1])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_compiles_whole(device):
    x, r, g, _, gamma, beta = (t.float().to(device) for t in inputs((3, 6, 8)))

    def both(x, r):
        y, s = layer_norm(x, gamma, beta, 1e-5, r)
        return layer_norm(y * s, None, None)

    x.requires_grad_()
    ours, eager = torch.compile(both, fullgraph=True, backend="aot_eager")(x, r), both(x, r)
    grads = [torch.autograd.grad(y, x, g)[0] for y in (ours, eager)]
    assert ours.shape == x.shape and grads[0].shape == x.shape
    if device == "cpu":
        assert torch.allclose(ours, eager, atol=1e-6) and torch.allclose(*grads, atol=1e-5)
