"""lora_linear against its reference and against PEFT's layer.

Tolerance: error against the float64 reference at most twice that of plain PyTorch in the same dtype, plus 1e-6.
"""

import pytest
import torch

from alignprop_fast.ops.lora_linear import lora_linear
from alignprop_fast.ops.lora_linear_plain import lora_linear_reference
from alignprop_fast.runtime.measure import LiveBytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(tokens, inner, outer, rank):
    generator = torch.Generator().manual_seed(rank)
    shapes = [(*tokens, inner), (outer, inner), (outer,), (rank, inner), (outer, rank)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE) / s[-1] ** 0.5 for s in shapes]


def value_and_gradients(fn, x, weight, bias, down, up, scale):
    learning = [t.detach().requires_grad_() for t in (x, down, up)]
    y = fn(learning[0], weight, bias, learning[1], learning[2], scale)
    g = torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=torch.float64).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, learning, g.to(y.dtype))]


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize(
    ("tokens", "inner", "outer", "rank"), [((2, 77), 40, 24, 4), ((5,), 129, 64, 16), ((3, 1), 8, 9, 128)]
)
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients(dtype, adapter_dtype, tokens, inner, outer, rank, biased):
    x, weight, bias, down, up = tensors(tokens, inner, outer, rank)
    bias = bias if biased else None

    def at(base, adapter, fn):
        cast = [None if t is None else t.to(base) for t in (x, weight, bias)]
        # Both see the same rounded numbers.
        return value_and_gradients(fn, *cast, down.to(adapter), up.to(adapter), 0.7)

    ours = at(dtype, adapter_dtype, lora_linear)
    plain = at(dtype, adapter_dtype, lora_linear_reference)
    x, weight, bias = (None if t is None else t.to(dtype).double() for t in (x, weight, bias))
    down, up = down.to(adapter_dtype), up.to(adapter_dtype)
    exact = at(torch.float64, torch.float64, lora_linear_reference)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


def test_gradcheck():
    x, weight, bias, down, up = tensors((3, 5), 6, 4, 2)
    learning = [t.requires_grad_() for t in (x, down, up)]
    assert torch.autograd.gradcheck(lambda a, d, u: lora_linear(a, weight, bias, d, u, 0.5), learning)


def test_a_frozen_layer_keeps_nothing_of_its_input():
    x, weight, bias, down, up = tensors((4, 9), 16, 8, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda t: t):
        lora_linear(x.requires_grad_(), weight, bias)
        lora_linear(x, weight, bias, down, up)
        assert x.shape not in saved
        lora_linear(x, weight, bias, down.requires_grad_(), up)
    assert saved.count(x.shape) == 1


def test_only_wanted_gradients_are_made():
    x, weight, bias, down, up = tensors((2, 7), 12, 10, 4)
    y = lora_linear(x, weight, bias, down.requires_grad_(), up, 2.0)
    assert torch.allclose(
        torch.autograd.grad(y.sum(), down)[0],
        torch.autograd.grad(lora_linear_reference(x, weight, bias, down, up, 2.0).sum(), down)[0],
    )


def test_strided_input_and_two_runs_bit_equal():
    x, weight, bias, down, up = (t.float() for t in tensors((6, 2), 24, 16, 8))
    strided = x.transpose(0, 1)
    one, two = (value_and_gradients(lora_linear, strided, weight, bias, down, up, 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    plain = value_and_gradients(lora_linear_reference, strided, weight, bias, down, up, 1.0)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, plain, strict=True))


def test_compiles_whole_and_runs_on_meta_tensors():
    x, weight, bias, down, up = (t.float() for t in tensors((2, 7), 12, 10, 4))
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    eager = value_and_gradients(lora_linear, x, weight, bias, down, up, 0.5)
    for a, b in zip(value_and_gradients(compiled, x, weight, bias, down, up, 0.5), eager, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    meta = lora_linear(*(t.to("meta") for t in (x, weight, bias, down, up)))
    assert meta.shape == (2, 7, 10)


def test_a_plan_without_a_gpu_counts_the_partial_sums_of_the_kernels():
    """FLUX's widest layer at rank 128: 67.5 MiB beside dx, and dA and dB in bf16."""
    sizes = (4608, 3072), (4608, 12288), (12288, 3072)
    x, g, weight = (torch.empty(size, device="meta", dtype=torch.bfloat16) for size in sizes)
    down, up = torch.empty(128, 3072, device="meta"), torch.empty(12288, 128, device="meta")
    y = lora_linear(x.requires_grad_(), weight, None, down.requires_grad_(), up.requires_grad_())
    with LiveBytes() as live:
        grads = torch.autograd.grad(y, [x, down, up], g)
    assert grads[0].nbytes + 67 * 2**20 < live.peak_bytes < grads[0].nbytes + 75 * 2**20


def test_compiles_whole_as_on_a_gpu(monkeypatch):
    """With kernels that could serve, because code under Dynamo does not see its tensors as fake."""
    monkeypatch.setattr("alignprop_fast.ops.lora_linear_trials.backend", lambda *arguments: "triton")
    x, weight, bias, down, up = (t.float() for t in tensors((2, 7), 12, 10, 4))
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        assert torch.allclose(
            compiled(x, weight, bias, down, up, 0.5), lora_linear_reference(x, weight, bias, down, up, 0.5), atol=1e-5
        )
    torch._dynamo.reset()
