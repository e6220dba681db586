"""The attention kernels against float64: output, logsumexp and all three gradients.

Tolerance: twice the error of plain PyTorch in the same dtype, plus 1e-6 (design rule for every op).
The kernels for few keys also run in fp32 here, because fp32 shows mistakes that half types hide. In use, fp32 goes to
the general kernels.
"""

import pytest
import torch

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("alignprop_fast.kernels.attention")
general = pytest.importorskip("alignprop_fast.kernels.attention_general")
short = pytest.importorskip("alignprop_fast.kernels.attention_short")
tiles = pytest.importorskip("alignprop_fast.kernels.attention_tiles")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies fp16 without BLAS, which is slow. Tests that do not depend on the dtype use fp32 there.
QUICK = torch.float16 if DEVICE == "cuda" else torch.float32
HALF = [torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("poisoned")


def plain(q, k, v, g, scale):
    """(o, lse, dq, dk, dv) of the expression that autograd differentiates, in the dtype of its inputs."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    logits = scale * (q @ k.mT)
    o = torch.softmax(logits, dim=-1) @ v
    return o.detach(), torch.logsumexp(logits.detach(), -1), *torch.autograd.grad(o, (q, k, v), g)


def inputs(m, n, d, dtype, b=1, h=2):
    """q, k, v, g as [B, H, rows, D] views of [B, rows, H, D] memory."""
    generator = torch.Generator().manual_seed(1000 * m + n + d)
    shapes = [(b, rows, h, d) for rows in (m, n, n, m)]
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).transpose(1, 2) for s in shapes]


def ours(module, q, k, v, g, scale):
    """(o, lse, dq, dk, dv) by one of the modules, or by the two public functions."""
    if module is kernels:
        o, lse = kernels.attention_forward(q, k, v, scale)
        return o, lse, *kernels.attention_backward(g, q, k, v, o, lse, scale)
    o, lse = module.Forward(q, k, v, scale)(q, k, v)
    # For few keys the backward pass needs no o.
    return o, lse, *module.Backward(g, q, k, v, *(() if module is short else (o,)), scale)(g, q, k, v, o, lse)


def assert_right(module, q, k, v, g, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found = ours(module, q, k, v, g, scale)
    same = plain(q, k, v, g, scale)
    exact = plain(*(t.double() for t in (q, k, v, g)), scale)
    for name, a, b, c in zip(("o", "lse", "dq", "dk", "dv"), found, same, exact, strict=True):
        error = (a.double() - c).abs().max()
        assert error <= 2 * (b.double() - c).abs().max() + 1e-6, f"{name}: {error}"
    return found


ANY = [
    *((130, 64, 32), (33, 129, 40), (70, 130, 59), (64, 128, 64), (17, 77, 80), (20, 33, 128), (33, 17, 160)),
    (1, 70, 40),
]
FEW = [(130, 77, 64), (97, 77, 40), (33, 77, 80), (70, 128, 59), (40, 100, 32), (64, 5, 16), (1, 77, 64)]


def shared_out(shapes):
    """Each shape in fp32, and in one of the half types: masks do not depend on the dtype, nor rounding on the shape."""
    return [*((torch.float32, *shape) for shape in shapes), *((HALF[i % 2], *shapes[i]) for i in range(len(shapes)))]


@pytest.mark.parametrize(("dtype", "m", "n", "d"), shared_out(ANY))
def test_any_shape(dtype, m, n, d):
    assert_right(general, *inputs(m, n, d, dtype))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of padded rows, which become zeros
@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 40), (torch.float16, 16), (torch.bfloat16, 16)])
@pytest.mark.parametrize("valid", [(70, 5), (64, 33)])
def test_padded_keys(dtype, d, valid):
    """Each batch element is attention over its valid keys, whatever the padding holds, with gradients of zero there."""
    tensors = inputs(20, 70, d, dtype, b=2, h=1)
    for b, count in enumerate(valid):
        for padded in tensors[1:3]:
            padded[b, :, count:] = 1e4
    q, k, v, g = tensors
    lengths = torch.tensor(valid, dtype=torch.int32, device=DEVICE)
    o, lse = kernels.attention_forward(q, k, v, 0.2, lengths)
    grads = kernels.attention_backward(g, q, k, v, o, lse, 0.2, lengths)
    for b, count in enumerate(valid):
        one = [t[b : b + 1] for t in tensors]
        one[1:3] = (t[:, :, :count] for t in one[1:3])
        same, exact = plain(*one, 0.2), plain(*(t.double() for t in one), 0.2)
        found = [t[b : b + 1] for t in (o, lse, *grads)]
        assert not any(t[:, :, count:].any() for t in found[3:])
        found[3:] = (t[:, :, :count] for t in found[3:])
        for name, x, y, z in zip(("o", "lse", "dq", "dk", "dv"), found, same, exact, strict=True):
            error = (x.double() - z).abs().max()
            assert error <= 2 * (y.double() - z).abs().max() + 1e-6, f"{name}: {error}"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("m", "n", "d"), [(257, 257, 64), (4097 if DEVICE == "cuda" else 131, 257, 40)])
def test_longer_sequences(dtype, m, n, d):
    assert_right(kernels, *inputs(m, n, d, dtype, h=1))


@pytest.mark.parametrize(("dtype", "m", "n", "d"), shared_out(FEW))
def test_few_keys(dtype, m, n, d):
    assert_right(short, *inputs(m, n, d, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("m", "d"), [(1, 64), (50, 40), (20, 160)])
def test_one_key(dtype, m, d):
    _, _, dq, dk, dv = assert_right(kernels, *inputs(m, 1, d, dtype))
    assert not dq.any() and not dk.any()
    assert all(t.transpose(1, 2).is_contiguous() for t in (dq, dk, dv))


def test_few_keys_and_a_large_head():
    """Forward by the kernel for few keys, backward by the general ones: they share o and lse."""
    q, k, v, g = inputs(40, 77, 128, torch.float16)
    assert short.serves_forward(q, k) and not short.serves_backward(q, k)
    assert_right(kernels, q, k, v, g)


@pytest.mark.parametrize("module", [general, short])
def test_strides_of_a_fused_projection(module):
    """q, k, v as views of [B, N, 3 H D]; g contiguous as [B, H, M, D], then one row for all."""
    b, h, n, d = 2, 2, 35, 40
    fused = torch.randn(b, n, 3 * h * d, generator=torch.Generator().manual_seed(0)).to(DEVICE, QUICK)
    q, k, v = (t.view(b, n, h, d).transpose(1, 2) for t in fused.chunk(3, dim=-1))
    g = torch.randn(b, h, n, d, generator=torch.Generator().manual_seed(1)).to(DEVICE, QUICK)
    assert_right(module, q, k, v, g)
    assert_right(module, q, k, v, g[:, :, :1].expand_as(q))


@pytest.mark.parametrize("module", [general, short])
def test_odd_strides(module):
    """Rows of an odd length, whose starts have no alignment."""
    odd = torch.randn(4, 1, 2, 35, 41, generator=torch.Generator().manual_seed(2)).to(DEVICE, QUICK)[..., 1:]
    assert_right(module, *odd)


def test_a_gradient_expanded_from_one_number():
    q, k, v, g = inputs(20, 77, 40, torch.float16)
    assert_right(kernels, q, k, v, g[:, :, :1, :1].expand_as(q))


@pytest.mark.parametrize("n", [77, 140])
def test_memory_of_the_results(n):
    """The next projection moves the heads back into the rows; this must not copy."""
    q, k, v, g = inputs(20, n, 32, torch.float16)
    o, lse, dq, dk, dv = ours(kernels, q, k, v, g, 0.2)
    for t, like in ((o, q), (dq, q), (dk, k), (dv, v)):
        assert t.shape == like.shape and t.dtype == like.dtype and t.transpose(1, 2).is_contiguous()
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32 and lse.is_contiguous()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of rows beyond the last key, which are not stored
@pytest.mark.parametrize("n", [77, 140])
def test_large_logits_do_not_overflow(n):
    """Logits of several thousand, all negative for one query: exp overflows or underflows in every format."""
    q, k, v, g = inputs(40, n, 32, torch.float16)
    k = k.abs()
    q[:, :, :20] = -q[:, :, :20].abs()
    found = assert_right(kernels, 16 * q, 16 * k, v, g, scale=1.0)
    assert found[1].min() < -1000 and found[1].max() > 1000
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("module", [general, short])
def test_two_runs_are_bit_equal(module):
    tensors = inputs(70, 77, 40, QUICK, b=2, h=1)
    one, two = ours(module, *tensors, 0.2), ours(module, *tensors, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("n", [77, 140])
def test_inputs_are_left_alone(n):
    tensors = inputs(40, n, 40, torch.float16)
    before = [t.clone() for t in tensors]
    ours(kernels, *tensors, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_split_queries_covers_every_block_once_and_fills_the_chip():
    for blocks in (1, 2, 31, 64, 128):
        for heads in (1, 20, 40, 263, 400):
            splits, per_split = short.split_queries(blocks, heads, 132)
            assert (splits - 1) * per_split < blocks <= splits * per_split
    # SDXL's cross-attention at 4096 queries in blocks of 32, a pair of 10 heads: 264 programs would be two for each.
    splits, _ = short.split_queries(128, 20, 132)
    assert 240 <= 20 * splits <= 264


def test_head_tiles_hold_every_head_with_little_padding():
    for d in range(1, kernels.MAX_HEAD_DIM + 1):
        d0, d1 = tiles.head_tiles(d)
        assert d <= d0 + d1 and all(t == 0 or (t >= 16 and t & (t - 1) == 0) for t in (d0, d1))
    assert [tiles.head_tiles(d) for d in (16, 40, 64, 80, 160)] == [(16, 0), (32, 16), (64, 0), (64, 16), (128, 32)]


def test_what_it_cannot_do_it_says():
    q, k, v, g = inputs(8, 8, 32, torch.float16)
    for bad in (
        (q, k, v[:, :, :4]),
        (q, k.float(), v),
        (q.double(), k.double(), v.double()),
        (q[:, :, :0], k, v),
        (q.mT.contiguous().mT, k, v),
        (*inputs(8, 8, 161, torch.float16)[:3],),
    ):
        with pytest.raises(ValueError):
            kernels.attention_forward(*bad, 1.0)
        with pytest.raises(ValueError):
            kernels.attention_backward(g, *bad, g, g[..., 0], 1.0)
    with pytest.raises(ValueError, match="lengths must be 1 contiguous numbers in int32"):
        kernels.attention_forward(q, k, v, 1.0, torch.ones(1, dtype=torch.int64, device=DEVICE))


def test_signatures_name_every_argument_and_every_kernel():
    entries = kernels.signatures()
    for entry in entries:
        names = entry["kernel"].arg_names
        assert sorted(names) == sorted([*entry["signature"], *entry["constexprs"]])
    assert len({entry["kernel"].__name__ for entry in entries}) == 6
    labels = [(entry["kernel"].__name__, entry["config"], str(entry["arch"])) for entry in entries]
    assert len(labels) == len(set(labels))
