"""FlashAttention 3 and 4, which cannot be installed here: fake modules stand for the packages.

So these tests show that a package is found, and what layout, dtype and arguments its functions get, no more. On a GPU
`ops.autotune` checks the real ones at each shape before they are used.
"""

import sys
from types import ModuleType

import pytest
import torch

from alignprop_fast.doctor import facts
from alignprop_fast.ops import attention_backends, attention_packages, attention_plain
from alignprop_fast.ops.attention_packages import FLASH3, FLASH4


def fake_forward(q, k, v, softmax_scale, return_lse=True):
    """[B, M, H, D] like the packages', with two more results, as theirs have."""
    o, lse = attention_plain.forward(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale)
    return o.transpose(1, 2).contiguous(), lse, None, None


def fake_backward4(q, k, v, out, dout, lse, softmax_scale, deterministic):
    assert dout.is_contiguous() and out.is_contiguous() and deterministic
    heads = [t.transpose(1, 2) for t in (dout, q, k, v, out)]
    return tuple(t.transpose(1, 2) for t in attention_plain.backward(*heads, lse, softmax_scale))


def fake_backward3(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, deterministic):
    grads = fake_backward4(q, k, v, out, dout, softmax_lse, softmax_scale, deterministic)
    for to, grad in zip((dq, dk, dv), grads, strict=True):
        assert to.is_contiguous()
        to.copy_(grad)


@pytest.fixture
def installed(monkeypatch):
    for name, functions in (
        (FLASH3, {"_flash_attn_forward": fake_forward, "_flash_attn_backward": fake_backward3}),
        (FLASH4, {"_flash_attn_fwd": fake_forward, "_flash_attn_bwd": fake_backward4}),
    ):
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    caches = (attention_packages.fault.cache_clear, attention_backends._cuda_backends.cache_clear)
    for clear in caches:
        clear()
    yield
    for clear in caches:
        clear()


@pytest.mark.parametrize("name", ["flash3", "flash4"])
def test_layouts_and_arguments(installed, name):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, rows, 3, 8, generator=generator).transpose(1, 2) for rows in (5, 7, 7))
    g = torch.randn(2, 3, 5, 1, generator=generator).expand_as(q)
    backend = attention_backends._cuda_backends()[name]
    torch.use_deterministic_algorithms(True)
    try:
        o, lse = backend.forward(q, k, v, 0.3)
        grads = backend.backward(g, q, k, v, o, lse, 0.3)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = attention_plain.forward(q, k, v, 0.3)
    exact += attention_plain.backward(g, q, k, v, *exact, 0.3)
    for found, wanted in zip((o, lse, *grads), exact, strict=True):
        # The order of products over copies can differ: fp32 rounding.
        assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-6)


def test_a_package_is_offered_only_if_it_can_be_imported(installed, monkeypatch):
    assert {"flash3", "flash4"} < attention_backends._cuda_backends().keys()
    monkeypatch.setitem(sys.modules, FLASH3, None)
    attention_packages.fault.cache_clear()
    attention_backends._cuda_backends.cache_clear()
    assert "flash3" not in attention_backends._cuda_backends()
    assert FLASH3 in attention_packages.fault(FLASH3)
    found = {fact.name: fact.value for fact in facts.attention_packages_found()}
    assert FLASH3 in found["FlashAttention 3"] and found["FlashAttention 4"] == "found"
