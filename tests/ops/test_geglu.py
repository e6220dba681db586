"""geglu: values and gradients against plain PyTorch, and the tensors it keeps.

Tolerance: error against the float64 reference at most twice that of plain PyTorch in the same dtype, plus 1e-6.
"""

import pytest
import torch

from alignprop_fast.ops.geglu import backend, geglu, geglu_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    uv, g = (torch.randn(*shape[:-1], k * shape[-1], generator=generator, dtype=torch.float64) for k in (2, 1))
    return uv.to(DEVICE), g.to(DEVICE)


def value_and_gradient(fn, uv, g):
    uv = uv.detach().requires_grad_()
    y = fn(uv)
    return y.detach(), *torch.autograd.grad(y, uv, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 7, 6), (1, 1, 1), (3, 5, 65)])
def test_values_and_gradient(dtype, shape):
    uv, g = (t.to(dtype) for t in inputs(shape))
    exact = value_and_gradient(geglu_reference, uv.double(), g.double())
    for a, b, c in zip(
        value_and_gradient(geglu, uv, g), value_and_gradient(geglu_reference, uv, g), exact, strict=True
    ):
        assert a.dtype == dtype and a.shape == c.shape
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


def test_gradcheck_and_strided_input():
    uv, g = inputs((2, 4, 3))
    assert torch.autograd.gradcheck(geglu, uv.requires_grad_())
    ours = value_and_gradient(geglu, uv.transpose(0, 1), g.transpose(0, 1))
    plain = value_and_gradient(geglu_reference, uv.transpose(0, 1), g.transpose(0, 1))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(("fn", "kept"), [(geglu, 2), (geglu_reference, 3)])
def test_the_projection_alone_is_kept(fn, kept):
    uv, _ = inputs((4, 16))
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        y = fn(uv.requires_grad_())
    # [u, v], and in stock PyTorch gelu(v).
    assert sum(storages.values()) == kept * y.numel() * 8


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_compiles_whole(device):
    uv, g = (t.float().to(device) for t in inputs((3, 6, 8)))
    compiled = torch.compile(geglu, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradient(compiled, uv, g), value_and_gradient(geglu, uv, g), strict=True):
        assert a.shape == b.shape and (device == "meta" or torch.allclose(a, b, atol=1e-6))


def test_backend():
    assert backend(torch.empty(2)) == "reference"
    if DEVICE == "cuda":
        pytest.importorskip("triton")
        assert backend(torch.empty(2, device="cuda")) == "triton"
        assert backend(torch.empty(2, device="cuda", dtype=torch.float64)) == "reference"
