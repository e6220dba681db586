"""group_norm_silu: values and gradients against their reference, and what it keeps.

Tolerance: error against the float64 reference at most twice that of plain PyTorch in the same dtype, plus 1e-6.
"""

import pytest
import torch

from alignprop_fast.ops.group_norm_silu import group_norm_silu, group_norm_silu_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def value_and_gradient(fn, x, g):
    x = x.detach().requires_grad_()
    y = fn(x)
    return y, *torch.autograd.grad(y, x, g.to(y))


def check(op, reference, x, g, dtype):
    """op and reference take (x, cast), where cast brings constants to x's dtype."""
    ours = value_and_gradient(lambda t: op(t, dtype), x.to(dtype), g)
    plain = value_and_gradient(lambda t: reference(t, dtype), x.to(dtype), g)
    exact = value_and_gradient(lambda t: reference(t, torch.float64), x.to(dtype).double(), g.to(dtype).double())
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "groups"), [((2, 8, 5, 7), 4), ((1, 6, 1, 3), 1), ((3, 32, 8, 8), 32)])
def test_group_norm_silu(dtype, memory_format, shape, groups):
    x, g = randn(*shape).to(memory_format=memory_format) * 3 + 1, randn(*shape).flip(0)
    gamma, beta = randn(shape[1]), randn(shape[1], 1)[:, 0] + 0.5
    check(
        lambda t, d: group_norm_silu(t, groups, gamma.to(d), beta.to(d), 1e-5),
        lambda t, d: group_norm_silu_reference(t, groups, gamma.to(d), beta.to(d), 1e-5),
        x,
        g,
        dtype,
    )


def test_gradcheck():
    gamma, beta = (torch.full((8,), value, dtype=torch.float64, device=DEVICE) for value in (0.7, 0.2))
    assert torch.autograd.gradcheck(lambda x: group_norm_silu(x, 4, gamma, beta), randn(2, 8, 4, 4).requires_grad_())


def kept_bytes(fn, x):
    """Bytes that autograd saves beside x itself and the weights."""
    sizes = {}

    def pack(t):
        if not isinstance(t, torch.nn.Parameter):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fn(x.requires_grad_())
    return sum(size for pointer, size in sizes.items() if pointer != x.untyped_storage().data_ptr()), sizes, y


def test_what_is_kept():
    x, ones = torch.randn(2, 16, 8, 8), torch.nn.Parameter(torch.ones(16), False)
    extra, sizes, _ = kept_bytes(lambda t: group_norm_silu(t, 4, ones, ones), x)
    # Mean and deviation of 4 groups of 2 images.
    assert extra == 2 * 2 * 4 * 4 and len(sizes) == 3
