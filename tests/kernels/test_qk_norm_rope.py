"""The Triton kernels of qk_norm_rope against the op's reference in float64, and as custom operators.

Tolerance: twice the error of plain PyTorch in the same dtype, plus 1e-6 (design rule for every op).
"""

import pytest
import torch

from alignprop_fast.ops import qk_norm_rope as ops
from alignprop_fast.ops.qk_norm_rope import Part, form_of, tensors_of

from ..ops.test_qk_norm_rope import EPS, inputs, plain

pytest.importorskip("triton")
kernels = pytest.importorskip("alignprop_fast.kernels.qk_norm_rope")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def arguments(parts, head_dim, halved):
    form = form_of(parts, head_dim, EPS, halved)
    return (*form.split(tensors_of(parts)), head_dim, EPS, halved)


def fused(parts, gs, head_dim, halved=False):
    """(q, k, [v], dq, dk of each part)."""
    projections, gammas, angles, *rest = arguments(parts, head_dim, halved)
    q, k, v = kernels.qk_norm_rope_forward(projections, gammas, angles, *rest)
    grads = kernels.qk_norm_rope_backward(*gs[:2], projections, gammas, angles, *rest[1:])
    return [q, k, *([v] if len(parts) > 1 else []), *grads]


@pytest.mark.parametrize(
    ("dtype", "lengths", "heads", "head_dim", "normed", "turned", "halved", "scale_dtype"),
    [
        *((dtype, (3, 34), (2, 2), 64, True, True, False, dtype) for dtype in DTYPES),
        *((dtype, (3, 34), (2, 2), 40, True, True, True, dtype) for dtype in DTYPES),
        # More heads than a program takes, and fewer of keys.
        (torch.bfloat16, (19,), (9, 2), 24, True, True, False, torch.float32),
        (torch.float32, (2, 5), (2, 2), 6, True, False, False, torch.float32),
        (torch.float32, (5,), (2, 2), 16, False, True, False, torch.float32),
        (torch.float32, (2, 3), (2, 2), 16, False, False, True, torch.float32),
    ],
)
def test_values_and_gradients(dtype, lengths, heads, head_dim, normed, turned, halved, scale_dtype):
    parts, gs, exact = (
        *inputs(lengths, heads, head_dim, dtype, normed, turned, scale_dtype=scale_dtype),
        plain(*inputs(lengths, heads, head_dim, dtype, normed, turned, True, scale_dtype), head_dim, halved),
    )
    same = plain(parts, gs, head_dim, halved)
    for a, b, c in zip(fused(parts, gs, head_dim, halved), same, exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


def test_angles_of_every_layout_and_strided_inputs_give_the_same_bits():
    """Complex numbers, FLUX's repeated cosines, one batch for all; projections from a wider matrix."""
    parts, gs = inputs((4, 9), (2, 2), 8, torch.float32)
    one = fused(parts, gs, 8)
    again = []
    for part in parts:
        cos, sin = part.angles
        numbers = torch.view_as_real(torch.complex(cos, sin)).unbind(-1)
        repeated = tuple(t.repeat_interleave(2, -1)[..., ::2] for t in (cos, sin))
        q, k, v = torch.cat([*part[:3], part.q], -1).chunk(4, -1)[:3]
        again.append(Part(q, k, v, part.scales, numbers if part is parts[0] else repeated))
    gs = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in gs]
    assert all(torch.equal(a, b) for a, b in zip(one, fused(again, gs, 8), strict=True))


def test_every_element_is_written_and_inputs_left_alone(poisoned):
    parts, gs = inputs((4, 18), (2, 2), 12, torch.float32)
    before = [t.clone() for t in tensors_of(parts)]
    assert not any(t.isnan().any() for t in fused(parts, gs, 12))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(parts), strict=True))


def test_custom_operators():
    parts, gs = inputs((2, 3), (2, 2), 8, torch.float32)
    given = arguments(parts, 8, False)
    torch.library.opcheck(ops._triton_forward.operator, given)
    torch.library.opcheck(ops._triton_backward.operator, (*gs[:2], *given[:3], *given[4:]))


def test_what_it_cannot_do_is_refused_and_the_op_knows_the_limit():
    assert ops.MAX_TRITON_HEAD_DIM == kernels.MAX_HEAD_DIM
    with pytest.raises(ValueError, match="at most 256 channels, not 258"):
        kernels.config(258)
    with pytest.raises(ValueError, match="the head dimension 7 must be even"):
        kernels.config(7)
