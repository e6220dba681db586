"""The Triton kernels of norm_modulate against the op's reference in float64, and as custom operators.

Tolerance: twice the error of plain PyTorch in the same dtype, plus 1e-6 (design rule for every op).
"""

import pytest
import torch

from alignprop_fast.ops import norm_modulate as ops

pytest.importorskip("triton")
kernels = pytest.importorskip("alignprop_fast.kernels.norm_modulate")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
NAMES = ("branch", "gate", "weight", "scale", "shift")
# What the models ask for: layer norm with an affine map; adaLN; FLUX's second; Z-Image's first and second;
# Krea 2's; all.
FORMS = {
    "plain": ((), 1.0, False),
    "affine": (("weight", "shift of all"), 1.0, False),
    "affine after a branch": (("branch", "weight", "shift of all"), 1.0, False),
    "adaLN": (("scale", "shift"), 1.0, False),
    "adaLN after a gated branch": (("branch", "gate", "scale", "shift"), 1.0, False),
    "RMS": (("weight", "scale"), 1.0, True),
    "RMS with a weight in fp32": (("branch", "gate", "weight in fp32", "scale", "shift"), 1.0, True),
    "RMS on a branch": (("weight", "scale", "shift of tokens"), 0.0, True),
    "all": (("branch", "gate of tokens", "weight", "scale of tokens", "shift of tokens"), 0.5, True),
}


def inputs(shape, dtype, form):
    """Arguments of `forward`, and gradients of both outputs. shape: [B, N, C]."""
    generator = torch.Generator().manual_seed(sum(shape))
    given, one, rms = FORMS[form]
    kinds = dict(name.partition(" ")[::2] for name in given)
    of_batch = (shape[0], 1, 6 * shape[-1])  # a chunk of the projection of a time embedding
    sizes = {"": of_batch, "of all": shape[-1:], "of tokens": shape}

    def draw(size):
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    x, g, h = draw(shape) * 2 + 3, draw(shape), draw(shape)
    found = []
    for name in NAMES:
        size = {"branch": shape, "weight": shape[-1:]}.get(name, sizes.get(kinds.get(name)))
        found.append(draw(size)[..., : shape[-1]] if name in kinds else None)
    if kinds.get("weight") == "in fp32":  # with values that do not fit a narrower dtype
        found[NAMES.index("weight")] = 1 + found[NAMES.index("weight")].float() / 3
    return [x, *found, EPS, one, rms], g, h


def in_float64(tensors):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


def plain(arguments, g, h):
    """(y, s, dx, dbranch), those that are there."""
    x, branch, gate, weight, scale, shift, eps, one, rms = arguments
    learning = [t.detach().requires_grad_() for t in (x, branch) if t is not None]
    more = {"one": one, "rms": rms, "gate": gate, "branch": None if branch is None else learning[1]}
    out = ops.norm_modulate_reference(learning[0], scale, shift, weight, eps, **more)
    if branch is None:
        return out.detach(), *torch.autograd.grad(out, learning, g)
    return *(t.detach() for t in out), *torch.autograd.grad(out, learning, [g, h])


def fused(arguments, g, h):
    x, branch, gate, weight, scale, _, *numbers = arguments
    y, s = kernels.norm_modulate_forward(*arguments)
    if branch is None:
        return y, kernels.norm_modulate_backward(g, None, x, None, weight, scale, *numbers)[0]
    dx, dbranch = kernels.norm_modulate_backward(g, h, s, gate, weight, scale, *numbers)
    return y, s, dx, dx if gate is None else dbranch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        *(((3, 5, 59), form) for form in FORMS),
        *(((2, 9, 320), "adaLN after a gated branch"), ((17, 1, 64), "plain"), ((1, 1, 2), "affine")),
        *(((2, 1, 1280), "RMS"), ((1, 1, 4100), "affine after a branch")),
    ],
)
def test_values_and_gradients(dtype, shape, form):
    arguments, g, h = inputs(shape, dtype, form)
    exact = plain(in_float64(arguments), g.double(), h.double())
    for a, b, c in zip(fused(arguments, g, h), plain(arguments, g, h), exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


def test_constant_rows_are_finite():
    x, g = torch.full((3, 40), 7.0, device=DEVICE), torch.linspace(-1, 1, 40, device=DEVICE).expand(3, 40)
    y, _ = kernels.norm_modulate_forward(x, *[None] * 5, EPS, 1.0, False)
    dx, _ = kernels.norm_modulate_backward(g, None, x, *[None] * 3, EPS, 1.0, False)
    assert y.abs().max() == 0
    assert torch.allclose(dx, g * EPS**-0.5, rtol=1e-5, atol=1e-4)  # g has a mean of zero


@pytest.mark.parametrize("form", ["adaLN after a gated branch", "all"])
def test_strided_inputs_and_two_runs_bit_equal(form):
    arguments, g, h = inputs((4, 3, 70), torch.float32, form)
    one = fused(arguments, g, h)
    apart = [torch.stack([t, t], -1)[..., 0] if isinstance(t, torch.Tensor) else t for t in arguments]
    two = fused(apart, g.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([h, h], -1)[..., 0])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_every_element_is_written_and_none_beyond():
    (x, branch, gate, weight, scale, shift, *_), g, h = inputs((1, 5, 70), torch.float32, "all")
    y, s, dx, dbranch = (torch.full((5 * 70 + 300,), float("nan"), device=DEVICE) for _ in range(4))
    flags = dict.fromkeys(("BRANCH", "GATE", "WEIGHT", "SCALE"), True) | {"RMS": False, "ROWS": 4, "BLOCK_C": 128}
    tensors = (x, branch, gate, weight, scale, shift, s, y)
    kernels.norm_modulate_forward_kernel[(2,)](*tensors, 5, 70, *[1, 70] * 3, EPS, 1.0, SHIFT=True, **flags)
    tensors = (g, h, s, gate, weight, scale, dx, dbranch)
    kernels.norm_modulate_backward_kernel[(2,)](*tensors, 5, 70, *[1, 70] * 2, EPS, 1.0, **flags)
    for t in (y, s, dx, dbranch):
        assert not t[:350].isnan().any() and t[350:].isnan().all()


@pytest.mark.parametrize("form", ["plain", "affine after a branch", "adaLN after a gated branch", "RMS on a branch"])
def test_custom_operators(form):
    arguments, g, h = inputs((2, 3, 20), torch.float32, form)
    x, branch, gate, weight, scale, _, *numbers = arguments
    torch.library.opcheck(ops._triton_forward.operator, tuple(arguments))
    strided = g.transpose(0, 1).contiguous().transpose(0, 1)
    given = (strided, None if branch is None else h, x, gate, weight, scale, *numbers)
    torch.library.opcheck(ops._triton_backward.operator, given)


def test_too_wide_is_refused_and_the_op_knows_the_limit():
    assert ops.MAX_TRITON_WIDTH == kernels.MAX_WIDTH
    with pytest.raises(ValueError, match="at most 8192 channels, not 8193"):
        kernels.config(8193)
