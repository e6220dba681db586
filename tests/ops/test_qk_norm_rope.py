"""qk_norm_rope, alone and before attention: values and gradients against plain PyTorch, and the tensors kept.

Tolerance: error against the float64 reference at most twice that of plain PyTorch in the same dtype, plus 1e-6.
"""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from alignprop_fast.ops.attention import attention_of_parts, attention_reference
from alignprop_fast.ops.qk_norm_rope import (
    Part,
    backend,
    normed_and_turned,
    qk_norm_rope,
    qk_norm_rope_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


def inputs(lengths, heads, head_dim, dtype, normed=True, turned=True, wide=False, scale_dtype=None):
    """(parts of these lengths, gradients of q, k and v). wide: the same numbers in float64."""
    generator = torch.Generator().manual_seed(sum(lengths))

    def draw(*shape, of=dtype):
        drawn = torch.randn(shape, generator=generator).to(DEVICE, of)
        return drawn.double() if wide else drawn

    parts = []
    for index, length in enumerate(lengths):
        q, k, v = (draw(2, length, count * head_dim) for count in (heads[0], heads[1], heads[1]))
        scales = (draw(head_dim, of=scale_dtype or dtype), draw(head_dim, of=scale_dtype or dtype))
        angles = 3 * draw(2 if index else 1, length, head_dim // 2, of=torch.float32)
        cos_and_sin = (angles.cos(), angles.sin())
        parts.append(Part(q, k, v, scales if normed else None, cos_and_sin if turned else None))
    return parts, [draw(2, sum(lengths), count, head_dim) for count in (heads[0], heads[1], heads[1])]


def learning(parts):
    """The parts with projections that get gradients, and these projections."""
    parts = [Part(*(t.detach().requires_grad_() for t in part[:3]), *part[3:]) for part in parts]
    return parts, [t for part in parts for t in part[:3]]


def plain(parts, gs, head_dim, halved=False):
    """(q, k, [v], dq, dk of each part), as the kernels return them."""
    parts, wanted = learning(parts)
    outputs = qk_norm_rope_reference(parts, head_dim, EPS, halved)
    grads = torch.autograd.grad(outputs, wanted, gs)
    outputs = outputs if len(parts) > 1 else outputs[:2]
    return [*(t.detach() for t in outputs), *(g for i, g in enumerate(grads) if i % 3 < 2)]


@pytest.mark.parametrize(
    ("dtype", "scale_dtype"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("lengths", [(5,), (3, 6)])
def test_values_and_gradients(dtype, scale_dtype, halved, lengths):
    def run(given, fn):
        parts, wanted = learning(given[0])
        outputs = fn(parts)
        return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, wanted, given[1])]

    def reference(parts):
        return qk_norm_rope_reference(parts, 8, EPS, halved)

    given = inputs(lengths, (4, 2), 8, dtype, scale_dtype=scale_dtype)
    ours = run(given, lambda parts: qk_norm_rope(parts, 8, EPS, halved))
    exact = run(inputs(lengths, (4, 2), 8, dtype, wide=True, scale_dtype=scale_dtype), reference)
    for a, b, c in zip(ours, run(given, reference), exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


@pytest.mark.parametrize("halved", [False, True])
def test_the_reference_is_diffusers(halved):
    (part,), _ = inputs((6,), (3, 3), 8, torch.float32)
    norm = nn.RMSNorm(8, eps=EPS)
    norm.weight.data = part.scales[0]
    cos, sin = (torch.cat([t[0]] * 2, -1) if halved else t[0].repeat_interleave(2, -1) for t in part.angles)
    x = part.q.unflatten(-1, (3, 8))
    theirs = apply_rotary_emb(norm(x), (cos, sin), use_real_unbind_dim=-2 if halved else -1, sequence_dim=1)
    assert torch.equal(normed_and_turned(x, part.scales[0], part.angles, EPS, halved), theirs)
    if not halved:  # Z-Image's and Qwen-Image's form; products of complex numbers may round once less
        numbers = torch.complex(*part.angles)
        theirs = apply_rotary_emb(norm(x), numbers, use_real=False)
        assert torch.allclose(normed_and_turned(x, part.scales[0], part.angles, EPS), theirs, atol=1e-6)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_attention_of_parts_keeps_the_projections_and_what_attention_returns(heads):
    """Also where heads of q share those of k and v."""
    parts, _ = inputs((3, 6), heads, 16, torch.float32)
    parts, wanted = learning(parts)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        o = attention_of_parts(parts, 16, EPS)
    tokens, shared = 2 * 9, sum(t.numel() for part in parts for pair in part[3:] for t in pair)
    assert sum(t.numel() for t in saved.values()) == tokens * (16 * (2 * heads[0] + 2 * heads[1]) + heads[0]) + shared
    grads = torch.autograd.grad(o.square().sum(), wanted)
    q, k, v = (t.transpose(1, 2) for t in qk_norm_rope_reference(parts, 16, EPS))
    k, v = (t.repeat_interleave(heads[0] // heads[1], 1) for t in (k, v))
    expected = attention_reference(q, k, v).transpose(1, 2).flatten(2)
    # Sums of 16 products in another order.
    assert torch.allclose(o, expected, atol=1e-5)
    for ours, theirs in zip(grads, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@torch.no_grad()  # as blocks are compiled
def test_compiles_whole_and_runs_on_meta_tensors():
    parts, _ = inputs((3, 6), (2, 2), 8, torch.float32)
    pairs = [part[3:] for part in parts]

    def run(*projections):
        parts = [Part(*projections[3 * i : 3 * i + 3], *pair) for i, pair in enumerate(pairs)]
        return attention_of_parts(parts, 8, EPS) + sum(t.flatten(2) for t in qk_norm_rope(parts, 8, EPS))

    projections = [t for part in parts for t in part[:3]]
    eager = run(*projections)
    assert torch.allclose(torch.compile(run, fullgraph=True, backend="aot_eager")(*projections), eager, atol=1e-6)
    meta = [Part(*(t.to("meta") for t in part[:3])) for part in parts]
    assert attention_of_parts(meta, 8, EPS).shape == eager.shape


def test_scales_and_angles_are_for_all_parts_or_none():
    one, other = inputs((3, 6), (2, 2), 8, torch.float32)[0]
    with pytest.raises(ValueError, match="all parts of a sequence have scales or none"):
        qk_norm_rope([one, other._replace(scales=None)], 8, EPS)


def test_backend():
    assert backend(torch.empty(2, 8), 8) == "reference"
    if DEVICE == "cuda":
        pytest.importorskip("triton")
        assert backend(torch.empty(2, 8, device="cuda"), 8) == "triton"
        assert backend(torch.empty(2, 8, device="cuda"), 258) == "reference"
