"""guided_step: the reference against the formula written out, and its adjoint against autograd."""

import pytest
import torch

from alignprop_fast.ops.guided_step import backend, guided_step, guided_step_adjoint, guided_step_reference


def test_guidance_and_update_written_out():
    x, z, uncond, cond = torch.randn(4, 2, 3, 5, 5, dtype=torch.float64)
    a, b, scale, sigma = 0.98, -0.11, 7.5, 0.2
    ours = guided_step(x, torch.cat([uncond, cond]), z, a, (b * (1 - scale), b * scale), sigma)
    assert torch.allclose(ours, a * x + b * (uncond + scale * (cond - uncond)) + sigma * z, atol=1e-12)


def test_adjoint_equals_autograd():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    uncond, cond = y.chunk(2)
    expected = torch.autograd.grad(0.9 * x - 4.0 * uncond + 5.0 * cond, (x, y), g)
    for ours, theirs in zip(guided_step_adjoint(g, 0.9, (-4.0, 5.0), torch.float64), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-14)


def test_inputs_are_left_alone_and_low_precision_is_summed_in_fp32():
    x, y = torch.full((1, 1, 1, 1), 256.0), torch.ones(2, 1, 1, 1, dtype=torch.bfloat16)
    out = guided_step(x, y, None, 1.0, (1.0, 1.0))
    # In bf16 256 + 1 is 256.
    assert out.item() == 258.0 and x.item() == 256.0 and backend(x) == "reference"


def test_more_branches_than_the_kernels_read_take_the_reference(monkeypatch):
    monkeypatch.setattr("alignprop_fast.ops.backend.backend", lambda x, op: "triton")
    x, y, weights = torch.randn(2, 5), torch.randn(6, 5), (0.5, -1.0, 2.0)
    assert backend(x, 2) == "triton"
    assert torch.equal(guided_step(x, y, None, 0.9, weights), guided_step_reference(x, y, None, 0.9, weights, 0.0))
    assert guided_step_adjoint(x, 0.9, weights, torch.float32)[1].shape == y.shape


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_compiles_whole(device):
    x, z, y = torch.randn(2, 4, device=device), torch.randn(2, 4, device=device), torch.randn(4, 4, device=device)

    def both(x, y, z):
        out = guided_step(x, y, z, 0.9, (-4.0, 5.0), 0.3)
        return out, *guided_step_adjoint(out, 0.9, (-4.0, 5.0), torch.float32)

    ours, eager = torch.compile(both, fullgraph=True, backend="aot_eager")(x, y, z), both(x, y, z)
    for a, b in zip(ours, eager, strict=True):
        assert a.shape == b.shape and (device == "meta" or torch.allclose(a, b, atol=1e-5))
