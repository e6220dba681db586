"""norm_modulate: values and gradients against plain PyTorch, and the tensors it keeps.

Tolerance: error against the float64 reference at most twice that of plain PyTorch in the same dtype, plus 1e-6.
"""

from functools import partial

import pytest
import torch

from alignprop_fast.ops import norm_modulate as norm
from alignprop_fast.ops.norm_modulate import backend, gated_sum, norm_modulate, norm_modulate_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# name -> (what is given beside x, other arguments): the forms that models ask for.
FORMS = {
    "adaLN": (("scale", "shift"), {}),
    "adaLN after a gated branch": (("branch", "gate", "scale", "shift"), {}),
    "RMS": (("weight", "scale"), {"rms": True}),
    "RMS with a weight in fp32": (("branch", "gate", "wide weight", "scale", "shift"), {"rms": True}),
    "RMS of a branch, added to tokens": (("weight", "scale", "tokens"), {"rms": True, "one": 0.0}),
    "weight and shift after a branch": (("branch", "weight", "shift"), {}),
}


def inputs(form, shape=(2, 7, 40), dtype=torch.float64):
    """x, the other inputs by name, and gradients of both results."""
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = {"branch": shape, "weight": shape[-1:], "wide weight": shape[-1:], "tokens": shape}
    given, more = FORMS[form]

    def draw(size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    found = {name: draw(sizes.get(name, (shape[0], 1, shape[-1]))) for name in given}
    if "tokens" in found:
        found["shift"] = found.pop("tokens")
    if "wide weight" in found:  # whose values do not fit a narrower dtype
        found["weight"] = 1 + found.pop("wide weight").to(torch.promote_types(dtype, torch.float32)) / 3
    return draw(shape), found, more, [draw(shape), draw(shape)]


def run(fn, x, given, more, grads, frozen=()):
    """The results, and the gradients of all that is not frozen."""
    tensors = {name: t.detach().requires_grad_(name not in frozen) for name, t in {"x": x, **given}.items()}
    learning = [t for t in tensors.values() if t.requires_grad]
    out = fn(**tensors, **more)
    out = out if isinstance(out, tuple) else (out,)
    return *(y.detach() for y in out), *torch.autograd.grad(out, learning, grads[: len(out)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [("weight", "scale", "gate"), ("weight",)])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form, frozen, dtype):
    x, given, more, grads = inputs(form, dtype=dtype)
    frozen = (*frozen, "shift") if "gate" in frozen and given.get("shift", x).shape != x.shape else frozen
    wide = x.double(), {name: t.double() for name, t in given.items()}, more, [g.double() for g in grads]
    exact = run(norm_modulate_reference, *wide, frozen)
    ours, plain = (run(fn, x, given, more, grads, frozen) for fn in (norm_modulate, norm_modulate_reference))
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    x, given, more, _ = inputs(form, (2, 3, 5))
    names = [name for name in given if name != "weight"]
    weight = {"weight": given["weight"]} if "weight" in given else {}

    def of(x, *rest):
        return norm_modulate(x, **dict(zip(names, rest, strict=True)), **weight, **more)

    assert torch.autograd.gradcheck(of, [x.requires_grad_(), *(given[name].requires_grad_() for name in names)])


@pytest.mark.parametrize("form", FORMS)
def test_the_sum_and_a_number_a_token_are_kept(form):
    x, given, more, _ = inputs(form, dtype=torch.float32)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
        out = norm_modulate(x.requires_grad_(), **given, **more)
    large = [t for t in saved.values() if t.numel() >= x.numel()]
    kept = out[1] if "branch" in given else x
    assert [t.data_ptr() for t in large] == [kept.data_ptr()]
    assert sum(t.numel() for t in saved.values()) <= x.numel() + 2 * 14 + 5 * 80, "statistics, modulations"


@pytest.mark.parametrize("form", ["adaLN", "RMS"])
def test_plain_backward_after_the_kernel_computes_the_statistics(form):
    x, given, more, (g, _) = inputs(form)
    weight, scale, numbers = given.get("weight"), given["scale"], (1e-6, 1.0, more.get("rms", False))
    _, _, *statistics = norm._plain_forward(x, None, None, weight, scale, None, *numbers)
    arguments = g, None, x, None, weight, scale, *numbers
    without, given = norm._backward_alone(*arguments)[0], norm._plain_backward(*arguments, statistics)[0]
    assert len(statistics) == (1 if numbers[2] else 2) and torch.allclose(without, given, atol=1e-12)


def test_one_row_for_all_and_strided_inputs():
    x, given, _, grads = inputs("adaLN after a gated branch")
    given |= {name: given[name][:1] for name in ("scale", "shift", "gate")}
    plain = run(norm_modulate_reference, x, given, {}, grads)
    apart = {name: torch.stack([t, t], -1)[..., 0] for name, t in given.items()}
    ours = run(norm_modulate, x.transpose(0, 1).contiguous().transpose(0, 1), apart, {}, grads)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("frozen", [("gate",), ()])
def test_gated_sum(frozen):
    x, given, _, grads = inputs("adaLN after a gated branch")
    given = {name: given[name] for name in ("branch", "gate")}
    ours = run(lambda x, branch, gate: gated_sum(x, gate, branch), x, given, {}, grads, frozen)
    plain = run(lambda x, branch, gate: x + gate * branch, x, given, {}, grads, frozen)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_compiles_whole(device):
    x, given, more, (g, _) = inputs("adaLN after a gated branch", (3, 6, 8), torch.float32)
    x, g, given = x.to(device).requires_grad_(), g.to(device), {name: t.to(device) for name, t in given.items()}

    def both(x):
        y, s = norm_modulate(x, **given, **more)
        return gated_sum(norm_modulate(s, rms=True), given["gate"], y)

    compiled = torch.compile(partial(both), fullgraph=True, backend="aot_eager")
    ours, eager = compiled(x), both(x)
    grads = [torch.autograd.grad(y, x, g)[0] for y in (ours, eager)]
    assert ours.shape == x.shape and grads[0].shape == x.shape
    if device == "cpu":
        assert torch.allclose(ours, eager, atol=1e-5) and torch.allclose(*grads, atol=1e-5)


def test_backend():
    assert backend(torch.empty(2, 8)) == "reference"
    if DEVICE == "cuda":
        pytest.importorskip("triton")
        assert backend(torch.empty(2, 8, device="cuda")) == "triton"
        assert backend(torch.empty(2, 8193, device="cuda")) == "reference"
        assert backend(torch.empty(2, 8, device="cuda", dtype=torch.float64)) == "reference"
