"""attention against plain PyTorch in float64, the tensors it keeps, and its report about autotuning.

Tolerance: error against the float64 reference at most twice that of plain PyTorch in the same dtype, plus 1e-6.
"""

import pytest
import torch

from alignprop_fast.ops import attention_backends as backends
from alignprop_fast.ops.attention import attention, attention_reference
from alignprop_fast.ops.attention_backends import choose, explain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plain(q, k, v, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(scale * q @ k.mT, dim=-1) @ v


def qkv(b, h, m, n, d, dtype=torch.float64):
    """Views of [B, N, H, D] memory, as the projections leave them."""
    generator = torch.Generator().manual_seed(m)
    shapes = ((b, m, h, d), (b, n, h, d), (b, n, h, d))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype).transpose(1, 2) for s in shapes]


def value_and_gradients(fn, tensors):
    learning = [t.detach().requires_grad_() for t in tensors]
    o = fn(*learning)
    g = torch.linspace(-1, 1, o.numel(), device=DEVICE, dtype=torch.float64).reshape(o.shape)
    return [o.detach(), *torch.autograd.grad(o, learning, g.to(o.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "d"), [(64, 64, 40), (129, 77, 64), (1, 77, 32), (77, 1, 80), (33, 33, 160), (200, 200, 16)]
)
def test_values_and_gradients(dtype, m, n, d):
    tensors = qkv(2, 3, m, n, d, dtype)
    ours, same = value_and_gradients(attention, tensors), value_and_gradients(attention_reference, tensors)
    exact = value_and_gradients(plain, [t.double() for t in tensors])
    for a, b, c in zip(ours, same, exact, strict=True):
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_keys_count_for_nothing(dtype):
    """Each batch element is attention over its valid keys alone, whatever the padding holds."""
    tensors, lengths = qkv(2, 3, 33, 40, 16, dtype), torch.tensor([40, 7], dtype=torch.int32, device=DEVICE)
    for padded in tensors[1:]:
        padded[1, :, 7:] = 1e4
    ours = value_and_gradients(lambda q, k, v: attention(q, k, v, lengths=lengths), tensors)
    same, exact = (
        value_and_gradients(lambda *qkv: attention_reference(*qkv, lengths=lengths), [t.to(to) for t in tensors])
        for to in (dtype, torch.float64)
    )
    for a, b, c in zip(ours, same, exact, strict=True):
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6
    assert not any(t[1, :, 7:].any() for t in ours[2:])
    alone = attention(*(t[1:, :, :count] for t, count in zip(tensors, (33, 7, 7), strict=True)))
    assert (ours[0][1] - alone[0]).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02)  # rounding of o


def test_scale_is_passed_on():
    tensors = qkv(1, 2, 20, 30, 16)
    for a, b in zip(
        value_and_gradients(lambda q, k, v: attention(q, k, v, 0.3), tensors),
        value_and_gradients(lambda q, k, v: plain(q, k, v, 0.3), tensors),
        strict=True,
    ):
        assert torch.allclose(a, b)


def test_any_strides():
    tensors = qkv(1, 2, 20, 30, 16)
    expected = value_and_gradients(attention, tensors)
    for i in range(3):
        columns = [t.mT.contiguous().mT if i == j else t for j, t in enumerate(tensors)]
        for a, b in zip(value_and_gradients(attention, columns), expected, strict=True):
            assert torch.allclose(a, b)


def test_keeps_q_k_v_o_and_the_logsumexp():
    q, k, v = (t.requires_grad_() for t in qkv(2, 3, 50, 20, 8, torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda t: t):
        attention(q, k, v)
    assert sorted(saved) == sorted([q.numel(), k.numel(), v.numel(), q.numel(), q.numel() // 8])


def test_two_runs_are_bit_equal():
    tensors = qkv(2, 3, 65, 77, 40, torch.float32)
    one, two = value_and_gradients(attention, tensors), value_and_gradients(attention, tensors)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_compiles_whole_and_runs_on_meta_tensors():
    tensors = qkv(1, 2, 16, 24, 32, torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradients(compiled, tensors), value_and_gradients(attention, tensors), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert attention(*(t.to("meta") for t in tensors)).shape == tensors[0].shape


def test_the_choice_is_explained():
    q, k, _ = qkv(1, 2, 16, 24, 32, torch.float16 if DEVICE == "cuda" else torch.float32)
    for direction in ("forward", "backward"):
        assert choose(direction, q, k).name in explain(direction, q, k)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_compiles_whole_as_on_a_gpu(monkeypatch, with_gradient):
    """Code under Dynamo does not see its tensors as fake; here the chosen implementation runs on the CPU."""
    monkeypatch.setattr(backends, "choose", backends._choose_on_gpu)
    monkeypatch.setitem(backends._BACKENDS, "efficient", backends.CPU)
    tensors = [t.cpu().requires_grad_(with_gradient) for t in qkv(1, 2, 16, 24, 32, torch.float32)]
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=False)
    try:
        with torch.set_grad_enabled(with_gradient):
            assert torch.allclose(compiled(*tensors), attention_reference(*tensors), atol=1e-6)
    finally:
        torch._dynamo.reset()
