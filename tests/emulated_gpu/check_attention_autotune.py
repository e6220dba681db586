"""Attention's choice on the emulated GPU: wrong implementations, PyTorch's guards, determinism."""

import pytest
import torch

from alignprop_fast.ops import attention_backends, autotune, switched_off
from alignprop_fast.ops.attention import attention

FAST = {"cudnn": 1.0, "flash": 2.0, "efficient": 3.0}


@pytest.fixture(autouse=True)
def cudnn_is_fastest(emulated, monkeypatch):
    """Times on an emulated GPU mean nothing, so cuDNN is set to win and Triton's interpreter is left out."""
    monkeypatch.setattr(autotune, "REPETITIONS", 1)
    times = dict(FAST)

    def told(problem, name, candidate, device, measure=autotune._milliseconds):
        result = measure(problem, name, candidate, device)
        return times[name] if isinstance(result, float) else result

    monkeypatch.setattr(autotune, "_milliseconds", told)
    backends = {name: backend for name, backend in attention_backends._cuda_backends().items() if name in FAST}
    monkeypatch.setattr(attention_backends, "_cuda_backends", lambda: backends)
    monkeypatch.setattr(autotune, "_save", lambda *arguments: None)
    emulated.faults.clear()
    autotune.forget()
    yield
    emulated.faults.clear()
    autotune.forget()
    switched_off.forget()


def qk(dtype=torch.bfloat16, tokens=40, keys=77):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, 2, 32, generator=generator).to("cuda", dtype).transpose(1, 2) for n in (tokens, keys)]


def test_the_fastest_is_taken_where_all_are_right():
    for direction in ("forward", "backward"):
        assert attention_backends.choose(direction, *qk()).name == "cudnn"


def test_keys_with_padding_go_to_one_that_takes_it_and_is_checked_with_it(emulated, monkeypatch):
    q, k = qk(torch.float32)
    for direction in ("forward", "backward"):
        assert attention_backends.choose(direction, q, k, padded=True).name == "efficient"
    autotune.forget()
    forward = attention_backends._BACKENDS["efficient"].forward
    ignoring = attention_backends.Backend("efficient", lambda q, k, v, scale, lengths: forward(q, k, v, scale), forward)
    monkeypatch.setattr(attention_backends, "offered", lambda *arguments: [ignoring])
    with pytest.raises(RuntimeError, match="'efficient': 'errors are"):
        attention_backends.choose("forward", q, k, padded=True)


def one_head_wrong(results, arguments):
    return results[0].clone().index_fill_(1, torch.tensor([1], device="cuda"), 0.0), *results[1:]


def nan_where_all_logits_are_low(results, arguments):
    lse = arguments[5]
    return tuple(torch.where(lse.amax() < -88.7, float("nan"), t) for t in results)


def wrong_for_g_in_its_own_memory(results, arguments):
    g, q = arguments[:2]
    return results if g.stride() == q.stride() else tuple(2 * t for t in results)


@pytest.mark.parametrize(
    ("name", "fault", "direction", "said"),
    [
        ("cudnn", one_head_wrong, "forward", ""),
        ("cudnn_backward", one_head_wrong, "backward", ""),
        ("cudnn_backward", nan_where_all_logits_are_low, "backward", "near -110"),
    ],
)
def test_a_wrong_one_does_not_win(emulated, name, fault, direction, said):
    emulated.faults[name] = fault
    q, k = qk()
    assert attention_backends.choose(direction, q, k).name == "flash"
    text = attention_backends.explain(direction, q, k)
    assert "cudnn: errors are" in text and said in text
    assert any("cudnn" in off for off in switched_off.everything())


def test_both_memories_of_g_are_tried(emulated):
    emulated.faults["flash_backward"] = wrong_for_g_in_its_own_memory
    emulated.faults["cudnn_backward"] = one_head_wrong
    q, k = qk()
    assert attention_backends.choose("backward", q, k).name == "efficient"
    assert "with g in the memory of [B, H, M, D]" in attention_backends.explain("backward", q, k)


def test_cudnn_gets_g_and_o_in_the_memory_of_q(emulated):
    """A plan for one memory layout of g also serves another; here it then gives twice the gradient."""
    emulated.faults["cudnn_backward"] = wrong_for_g_in_its_own_memory
    q, k = qk()
    assert attention_backends.choose("backward", q, k).name == "cudnn"
    q, k, v = (t.detach().requires_grad_() for t in (q, k, k))
    o = attention(q, k, v)
    g = torch.randn(o.shape, device="cuda", dtype=o.dtype)
    one, two = (torch.autograd.grad(o, q, t, retain_graph=True)[0] for t in (g, g.mT.contiguous().mT))
    assert torch.equal(one, two)


def test_pytorch_s_guard_is_respected(monkeypatch):
    monkeypatch.setitem(attention_backends._GUARDS, "cudnn", lambda params: False)
    q, k = qk()
    for direction in ("forward", "backward"):
        assert attention_backends.choose(direction, q, k).name == "flash"
        assert "cudnn: PyTorch refuses it" in attention_backends.explain(direction, q, k)


def test_no_cudnn_backward_where_bits_are_to_be_the_same(emulated):
    """It also takes the first correct implementation, not the fastest."""
    q, k = qk()
    assert attention_backends.choose("backward", q, k).name == "cudnn"
    torch.use_deterministic_algorithms(True)
    try:
        assert attention_backends.choose("forward", q, k).name == "flash"
        assert attention_backends.choose("backward", q, k).name == "flash"
        assert "cudnn: its backward pass is not deterministic" in attention_backends.explain("backward", q, k)
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_switched_off_is_not_taken():
    q, k = qk()
    assert attention_backends.choose("forward", q, k).name == "cudnn"
    switched_off.switch_off("attention.cudnn.forward", "it gave nan")
    assert attention_backends.choose("forward", q, k).name == "flash"
    assert "cudnn: it gave nan" in attention_backends.explain("forward", q, k)


def test_a_choice_draws_no_random_number_of_the_program():
    torch.manual_seed(0)
    expected = torch.randn(3, device="cuda")
    torch.manual_seed(0)
    attention_backends.choose("backward", *qk())
    assert torch.equal(torch.randn(3, device="cuda"), expected)


def test_single_precision_and_inference_mode():
    with torch.inference_mode():
        assert attention_backends.choose("forward", *qk(torch.float32)).name == "efficient"
