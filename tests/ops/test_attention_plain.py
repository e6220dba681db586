"""attention in plain PyTorch against float64, in one piece and in several, and on devices with no other kernels.

Tolerance: error against the float64 reference at most twice that of PyTorch's own in the same dtype, plus 1e-6.
"""

import logging

import pytest
import torch

from alignprop_fast.ops import attention_backends, attention_plain, backend, switched_off
from alignprop_fast.ops.attention import attention, attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(m, n, d, dtype):
    """q, k, v and the gradient of o."""
    generator = torch.Generator().manual_seed(m)
    shapes = [(2, rows, 3, d) for rows in (m, n, n, m)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype).transpose(1, 2) for s in shapes]


def by_autograd(q, k, v, g, lengths=None, bias=None):
    learning = [t.detach().requires_grad_() for t in (q, k, v)]
    if bias is None:
        o = attention_reference(*learning, 0.2, lengths)
    else:
        o = torch.nn.functional.scaled_dot_product_attention(*learning, bias, scale=0.2)
    return [o.detach(), *torch.autograd.grad(o, learning, g)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(("m", "n", "d"), [(40, 77, 40), (1, 5, 8), (33, 1, 16), (70, 70, 160)])
def test_values_and_gradients(monkeypatch, dtype, pieces, m, n, d):
    if pieces:
        monkeypatch.setattr(attention_plain, "LOGITS_BYTES", 4 * 6 * n * 7)  # seven queries at a time
    tensors = inputs(m, n, d, dtype)
    q, k, v, g = tensors
    o, lse = attention_plain.forward(q, k, v, 0.2)
    ours = [o, *attention_plain.backward(g, q, k, v, o, lse, 0.2)]
    same, exact = by_autograd(*tensors), by_autograd(*(t.double() for t in tensors))
    for a, b, c in zip(ours, same, exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6
    # Sums of 160 products in fp32.
    logits = 0.2 * q.double() @ k.double().mT
    assert torch.allclose(lse.double(), logits.logsumexp(-1), atol=1e-5)


def test_padded_keys_in_pieces(monkeypatch):
    monkeypatch.setattr(attention_plain, "LOGITS_BYTES", 4 * 6 * 20 * 7)
    q, k, v, g = inputs(40, 20, 8, torch.float64)
    lengths = torch.tensor([3, 20], dtype=torch.int32, device=DEVICE)
    o, lse = attention_plain.forward(q, k, v, 0.2, lengths)
    ours = [o, *attention_plain.backward(g, q, k, v, o, lse, 0.2, lengths)]
    for a, b in zip(ours, by_autograd(q, k, v, g, lengths), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("backend", [attention_backends.PLAIN, attention_backends.CPU], ids=lambda one: one.name)
def test_marked_tokens_have_one_added_to_their_logits(monkeypatch, backend):
    monkeypatch.setattr(attention_plain, "LOGITS_BYTES", 4 * 6 * 20 * 7)
    tensors = [t.cpu() for t in inputs(20, 20, 8, torch.float64)]
    q, k, v, g = tensors
    marks = torch.tensor([[1.0] * 5 + [0.0] * 9 + [1.0] * 6, [1.0] * 20])
    o, lse = backend.forward(q, k, v, 0.2, marks)
    ours = [o, *backend.backward(g, q, k, v, o, lse, 0.2, marks)]
    bias = (marks[:, None, :, None] * marks[:, None, None]).double()
    for a, b in zip(ours, by_autograd(*tensors, bias=bias), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_its_logsumexp_and_gradients_go_with_those_of_another():
    q, k, v, g = inputs(40, 20, 32, torch.float32)
    other = attention_backends.choose("forward", q, k)
    o, lse = other.forward(q, k, v, 0.2)
    crossed = other.backward(g, q, k, v, *attention_plain.forward(q, k, v, 0.2), 0.2)
    for a, b in zip(crossed, attention_plain.backward(g, q, k, v, o, lse, 0.2), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_no_query_and_no_key():
    q, k, v, g = inputs(4, 3, 8, torch.float32)
    o, lse = attention_plain.forward(q[:, :, :0], k, v, 0.2)
    assert o.shape == (2, 3, 0, 8) and lse.shape == (2, 3, 0)
    dq, dk, _ = attention_plain.backward(g[:, :, :0], q[:, :, :0], k, v, o, lse, 0.2)
    assert dq.shape == (2, 3, 0, 8) and not dk.any()
    assert not attention_plain.forward(q, k[:, :, :0], v[:, :, :0], 0.2)[0].any()


@pytest.fixture
def on_another_device(monkeypatch):
    """Code that asks for the device gets one that is neither NVIDIA's nor the CPU."""

    class Elsewhere(torch.Tensor):
        device = torch.device("mps")
        is_cuda = False
        is_cpu = False

    switched_off.forget()
    yield lambda t: t.detach().clone().as_subclass(Elsewhere)
    switched_off.forget()


def test_another_device_takes_it_with_one_line(on_another_device, caplog):
    q, k, v, g = inputs(20, 30, 16, torch.float32)
    there = [on_another_device(t) for t in (q, k, v)]
    with caplog.at_level(logging.WARNING):
        learning = [t.requires_grad_() for t in there]
        o = attention(*learning, 0.2)
        grads = torch.autograd.grad(o, learning, g)
    assert attention_backends.choose("forward", there[0], there[1]) is attention_backends.PLAIN
    assert "plain PyTorch" in attention_backends.explain("backward", there[0], there[1])
    for a, b in zip([o, *grads], by_autograd(q, k, v, g), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        "kernels is switched off: there are none for mps, where plain PyTorch serves every op"
    ]


def test_amd_gpus_call_themselves_cuda(monkeypatch):
    switched_off.forget()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    q = torch.empty(1, 1, 4, 8)
    assert attention_backends.choose("forward", q, q) is attention_backends.CPU

    class OnCuda(torch.Tensor):
        device = torch.device("cuda", 0)
        is_cuda = True
        is_cpu = False

    there = q.as_subclass(OnCuda)
    assert attention_backends.choose("forward", there, there) is attention_backends.PLAIN
    assert backend.backend(there, "activation") == "reference" and "AMD" in switched_off.everything()["kernels"]
    switched_off.forget()
