"""Activations: values and gradients against plain PyTorch, and the tensors they keep.

Tolerance: error against the float64 reference at most twice that of plain PyTorch in the same dtype, plus 1e-6.
"""

import pytest
import torch

from alignprop_fast.ops.activation import (
    backend,
    geglu,
    geglu_reference,
    gelu_tanh,
    gelu_tanh_reference,
    swiglu,
    swiglu_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# name -> (ours, reference, widths of the inputs in units of D)
OPS = {
    "geglu": (geglu, geglu_reference, (2,)),
    "swiglu": (swiglu, swiglu_reference, (2,)),
    "swiglu apart": (swiglu, swiglu_reference, (1, 1)),
    "gelu_tanh": (gelu_tanh, gelu_tanh_reference, (1,)),
}


def inputs(shape, widths, dtype=torch.float64):
    """The inputs, widths times shape[-1] wide, and a gradient of the result."""
    generator = torch.Generator().manual_seed(sum(shape))
    tensors = [torch.randn(*shape[:-1], k * shape[-1], generator=generator, dtype=torch.float64) for k in (*widths, 1)]
    return [t.to(DEVICE, dtype) for t in tensors]


def value_and_gradients(fn, xs, g):
    xs = [x.detach().requires_grad_() for x in xs]
    y = fn(*xs)
    return y.detach(), *torch.autograd.grad(y, xs, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 7, 6), (1, 1, 1), (3, 5, 65)])
@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients(op, dtype, shape):
    ours, reference, widths = OPS[op]
    *xs, g = inputs(shape, widths, dtype)
    exact = value_and_gradients(reference, [x.double() for x in xs], g.double())
    for a, b, c in zip(value_and_gradients(ours, xs, g), value_and_gradients(reference, xs, g), exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


@pytest.mark.parametrize("op", OPS)
def test_gradcheck_and_strided_input(op):
    ours, reference, widths = OPS[op]
    *xs, g = inputs((2, 4, 3), widths)
    assert torch.autograd.gradcheck(ours, [x.requires_grad_() for x in xs])
    strided = [x.transpose(0, 1) for x in xs]
    plain = value_and_gradients(reference, strided, g.transpose(0, 1))
    fused = value_and_gradients(ours, strided, g.transpose(0, 1))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(fused, plain, strict=True))


@pytest.mark.parametrize("op", ["swiglu", "gelu_tanh"])
def test_beside_another_tensor_and_as_part_of_a_larger_projection(op):
    ours, reference, widths = OPS[op]
    x, beside, _ = inputs((2, 3, 8), (5, 2))
    g = torch.randn(2, 3, 16 + 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def run(fn):
        return value_and_gradients(lambda x, b: fn(x[..., 24 : 24 + 8 * widths[0]], beside=b), [x, beside], g)

    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(run(ours), run(reference), strict=True))


@pytest.mark.parametrize(
    ("fn", "kept"),
    [(geglu, 2), (geglu_reference, 3), (swiglu, 2), (swiglu_reference, 3), (lambda x: gelu_tanh(x, x.detach()), 2)],
)
def test_the_projection_alone_is_kept(fn, kept):
    x, _ = inputs((4, 16), (2,))
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        fn(x.requires_grad_())
    # Both halves, and in stock PyTorch the gate.
    assert sum(storages.values()) == kept * 4 * 16 * 8


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", OPS)
def test_compiles_whole(op, device):
    ours, _, widths = OPS[op]
    *xs, g = (t.float().to(device) for t in inputs((3, 6, 8), widths))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradients(compiled, xs, g), value_and_gradients(ours, xs, g), strict=True):
        assert a.shape == b.shape and (device == "meta" or torch.allclose(a, b, atol=1e-6))


def test_backend():
    assert backend(torch.empty(2)) == "reference"
    if DEVICE == "cuda":
        pytest.importorskip("triton")
        assert backend(torch.empty(2, device="cuda")) == "triton"
        assert backend(torch.empty(2, device="cuda", dtype=torch.float64)) == "reference"
