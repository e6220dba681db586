"""The Triton kernels of lora_linear against the op's reference and its autograd in float64.

Tolerance: twice the error of plain PyTorch in the same dtype, plus 1e-6 (design rule for every op).
"""

import pytest
import torch

from alignprop_fast.kernels import lora_blocks
from alignprop_fast.ops.lora_linear_plain import lora_linear_reference

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("alignprop_fast.kernels.lora_linear")
backward = pytest.importorskip("alignprop_fast.kernels.lora_linear_backward")
launch = pytest.importorskip("alignprop_fast.kernels.launch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALES = (0.5, 1.5, 2.0)


pytestmark = pytest.mark.usefixtures("poisoned")


def case(tokens, n_in, outs, ranks, dtype, adapter_dtype=None, strided=False, bias=(True, False, True)):
    """(x, weights, biases, downs, ups, scales, gs), with outputs and gradients of a token near one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, std=1.0, dtype=dtype):
        return (torch.randn(shape, generator=generator) * std).to(DEVICE, dtype)

    extra = 5 if strided else 0
    x = normal(tokens, n_in + extra)[:, :n_in]
    gs = [normal(tokens, n + extra, std=n**-0.5)[:, extra:] for n in outs]
    weights = [normal(n, n_in, std=n_in**-0.5) for n in outs]
    biases = [normal(n) if has else None for n, has in zip(outs, bias, strict=False)]
    adapter = adapter_dtype or dtype
    downs = [normal(r, n_in, std=n_in**-0.5, dtype=adapter) for r in ranks]
    ups = [normal(n, r, std=r**-0.5, dtype=adapter) for n, r in zip(outs, ranks, strict=True)]
    return x, weights, biases, downs, ups, SCALES[: len(outs)], gs


def plain(x, weights, biases, downs, ups, scales, gs, dtype=None):
    """[*ys, gx, *dAs, *dBs] by the reference and autograd, everything in `dtype` if one is given."""

    def leaf(m):
        return (m if dtype is None else m.to(dtype)).detach().requires_grad_()

    x, downs, ups = leaf(x), [leaf(a) for a in downs], [leaf(b) for b in ups]
    frozen = [(w.to(x.dtype), None if b is None else b.to(x.dtype)) for w, b in zip(weights, biases, strict=True)]
    ys = [lora_linear_reference(x, *f, a, b, s) for f, a, b, s in zip(frozen, downs, ups, scales, strict=True)]
    grads = torch.autograd.grad(ys, [x, *downs, *ups], [g.to(x.dtype) for g in gs])
    return [y.detach() for y in ys] + list(grads)


def projections(*parts):
    return list(zip(*parts, strict=True))


def fused(x, weights, biases, downs, ups, scales, gs):
    layers, t = projections(weights, biases, downs, ups, scales), kernels.lora_down(x, downs)
    ys = kernels.Forward(x, layers)(x, layers)
    gx, d_downs, d_ups = backward.lora_linear_backward(gs, x, t, weights, downs, ups, scales, True)
    assert all(d.dtype == torch.float32 for d in (*d_downs, *d_ups))
    return [*ys, gx, *(d.to(downs[0].dtype) for d in (*d_downs, *d_ups))]


def within(ours, theirs, exact):
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


def check(arguments):
    ours = fused(*arguments)
    within(ours, plain(*arguments), plain(*arguments, dtype=torch.float64))
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "outs, ranks, strided", [((129,), (4,), False), ((64, 40), (16, 4), True), ((48, 129, 33), (16, 5, 20), True)]
)
def test_projections(dtype, outs, ranks, strided):
    check(case(77, 40, outs, ranks, dtype, strided=strided))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reruns_are_bit_equal(dtype):
    arguments = case(33, 24, (20, 17), (4, 16), dtype)
    for first, again in zip(check(arguments), fused(*arguments), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [64, 128])
def test_high_ranks(dtype, rank):
    check(case(17, 65, (24,), (rank,), dtype, bias=(False,)))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_adapters_in_fp32(dtype):
    """Adapters are cast when they are read; their gradients are fp32."""
    check(case(77, 40, (48, 33), (16, 4), dtype, torch.float32))


@pytest.mark.parametrize("tokens", [1, 700])
def test_one_token_and_several_chunks(tokens):
    """700 tokens are two chunks of the sum for dA and several row blocks; the last of each is incomplete."""
    check(case(tokens, 16, (16, 5), (4, 3), torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_split(dtype):
    arguments = case(77, 40, (48, 129, 33), (16, 5, 20), dtype, strided=True)
    x, *parts, _ = arguments
    ys = kernels.split_forward(x, projections(*parts))
    within(ys, plain(*arguments)[:3], plain(*arguments, dtype=torch.float64)[:3])


def test_input_gradient_only_if_wanted():
    x, weights, _, downs, ups, scales, gs = case(5, 16, (16,), (4,), torch.float32)
    t = kernels.lora_down(x, downs)
    assert backward.lora_linear_backward(gs, x, t, weights, downs, ups, scales, False)[0] is None


# (tokens of a guided pair, width): SDXL at 1024 x 1024, then SD1.5 at 512 x 512. Its last block has too little work.
MODEL_SHAPES = [(8192, 640), (2048, 1280), (8192, 320), (2048, 640), (512, 1280)]


@pytest.mark.parametrize(("tokens", "width"), MODEL_SHAPES)
def test_programs_for_an_h100(tokens, width):
    """132 processors, at rank 16, for the sums over tokens and for adding them; u is cut to the smallest tile."""
    blocks = kernels.config("grad", torch.bfloat16, 16)
    chunk = lora_blocks.chunk_tokens(tokens, width, torch.bfloat16, 16)
    assert triton.cdiv(tokens, chunk) * triton.cdiv(width, blocks["BLOCK_N"]) >= 132
    assert triton.cdiv(16 * width, kernels.SUM_BLOCK) >= 132
    rows = kernels.narrow_blocks(tokens, torch.bfloat16, 16)["BLOCK_T"]
    assert triton.cdiv(tokens, rows) >= min(132, tokens // 16)


def test_partial_sums_of_a_wide_layer_are_small(monkeypatch):
    """FLUX's widest layer at rank 128: 432 MiB for dB alone, when each 64 tokens had a part of their own."""
    sizes = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, arguments, options: sizes.append(arguments[2]))
    monkeypatch.setattr(backward, "add_parts", lambda parts: torch.zeros(parts.shape[1], device="meta"))
    x, u, g = (torch.empty(4608, n, device="meta", dtype=torch.bfloat16) for n in (3072, 128, 12288))
    backward.adapter_grads(x, u, [g], u, (128,), (1.0,))
    assert sizes[0].numel() * 4 <= 68 * 2**20
    *_, chunks, numbers = lora_blocks.partial_sums(4608, 3072, [12288], [128], torch.bfloat16)
    assert sizes[0].shape == (chunks, sum(numbers))


def test_rank_above_the_limit():
    x, *parts, _ = case(2, 16, (16,), (129,), torch.float32)
    with pytest.raises(ValueError, match="rank 129"):
        kernels.Forward(x, projections(*parts))
