"""qk_norm_rope: RMSNorm of queries and keys by head, then rotary positions, for a sequence of one or more parts.

    xhat = rstd x,   rstd = (mean(x^2) + eps)^-1/2        y = R (gamma * xhat)

(Zhang & Sennrich 2019, eq. 4; Su et al. 2021, eq. 34.) R turns pairs (a, b) of channels by the angles of a token:
(a cos - b sin, a sin + b cos). Each part, such as text and image, has its own scales and angles. Queries, keys and
values of all parts are written into one buffer each, in place of a concatenation. Norm and rotation are computed again
in the backward pass, so only the projections are kept. The scales gamma are frozen.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alignprop_fast.ops import backend as backends
from alignprop_fast.ops.backend import Function, Launch

Tensor = torch.Tensor
MAX_TRITON_HEAD_DIM = 256  # kernels.qk_norm_rope.MAX_HEAD_DIM


class Part(NamedTuple):
    """Projections of one part of the sequence, [B, N, H D] each; q can have more heads than k and v.

    scales: gamma [D] of q and of k, in their dtype or fp32; None: no norm. angles: cos and sin [B or 1, N, D / 2] in
    fp32; None: no rotation.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scales: tuple[Tensor, Tensor] | None = None
    angles: tuple[Tensor, Tensor] | None = None


class Form(NamedTuple):
    """What a call does, besides its tensors: `tensors_of` has their order."""

    parts: int
    normed: bool
    turned: bool
    head_dim: int
    eps: float
    halved: bool

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(projections: q, k, v by part; scales: of q, k by part; angles: cos, sin by part) of `tensors_of`."""
        first, second = 3 * self.parts, 3 * self.parts + 2 * self.parts * self.normed
        return list(tensors[:first]), list(tensors[first:second]), list(tensors[second:])


def form_of(parts: Sequence[Part], head_dim: int, eps: float, halved: bool) -> Form:
    """Raises ValueError if only some of the parts have scales, or angles."""
    given = {(part.scales is not None, part.angles is not None) for part in parts}
    if len(given) != 1:
        raise ValueError("all parts of a sequence have scales or none, and all have angles or none")
    return Form(len(parts), *given.pop(), head_dim, eps, halved)


def tensors_of(parts: Sequence[Part]) -> list[Tensor]:
    """Projections of all parts, then scales, then angles."""
    pairs = [*(part.scales for part in parts), *(part.angles for part in parts)]
    return [*(t for part in parts for t in part[:3]), *(t for pair in pairs if pair is not None for t in pair)]


def qk_norm_rope_reference(
    parts: Sequence[Part], head_dim: int, eps: float, halved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch; see `qk_norm_rope`."""
    return _prepared_by(_plain_forward, form_of(parts, head_dim, eps, halved), tensors_of(parts))


def normed_and_turned(
    x_BNHD: Tensor, scale: Tensor | None, angles: tuple[Tensor, Tensor] | None, eps: float, halved: bool = False
) -> Tensor:
    """Queries or keys of one part in plain PyTorch, [B, N, H, D]; the rotation is fp32 or wider."""
    x = x_BNHD if scale is None else F.rms_norm(x_BNHD.to(scale.dtype), scale.shape, scale, eps)
    if angles is not None:
        cos, sin = angles
        x = _turned(x.to(_wide(x)), cos, sin, halved)
    return x.to(x_BNHD.dtype)


def backend(x: Tensor, head_dim: int) -> str:
    """The implementation for x: "triton" on a CUDA device for heads up to 256, else "reference"."""
    return backends.backend(x, "qk_norm_rope") if head_dim <= MAX_TRITON_HEAD_DIM else "reference"


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _turned(x_BNHD: Tensor, cos_BNP: Tensor, sin_BNP: Tensor, halved: bool) -> Tensor:
    cos, sin = cos_BNP.unsqueeze(2), sin_BNP.unsqueeze(2)
    pairs = x_BNHD.unflatten(-1, (2, -1) if halved else (-1, 2))
    a, b = pairs.unbind(-2 if halved else -1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -2 if halved else -1).flatten(-2)


def _plain_forward(
    projections: list[Tensor], gammas: list[Tensor], angles: list[Tensor], head_dim: int, eps: float, halved: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kernel's results: q, k and v of the sequence, [B, S, H, D]; v is None if there is only one part."""
    heads = [x.unflatten(-1, (-1, head_dim)) for x in projections]
    parts = range(len(heads) // 3)
    pairs = [(angles[2 * part], angles[2 * part + 1]) if angles else None for part in parts]
    q, k = (
        [
            normed_and_turned(
                heads[3 * part + one], gammas[2 * part + one] if gammas else None, pairs[part], eps, halved
            )
            for part in parts
        ]
        for one in (0, 1)
    )
    if len(parts) == 1:
        return q[0], k[0], None
    return torch.cat(q, 1), torch.cat(k, 1), torch.cat(heads[2::3], 1)


def _plain_backward(
    dq: Tensor,
    dk: Tensor,
    projections: list[Tensor],
    gammas: list[Tensor],
    angles: list[Tensor],
    eps: float,
    halved: bool,
) -> list[Tensor]:
    """The kernel's results: gradients of q and k of each part, [B, N, H D]."""
    found, start = [], 0
    for part in range(len(projections) // 3):
        stop = start + projections[3 * part].shape[1]
        cos_and_sin = angles[2 * part : 2 * part + 2]
        for one, g in enumerate((dq, dk)):
            x, gamma = projections[3 * part + one], gammas[2 * part + one] if gammas else None
            found.append(_plain_gradient(g[:, start:stop], x, gamma, cos_and_sin, eps, halved))
        start = stop
    return found


def _plain_gradient(
    g_BNHD: Tensor, x: Tensor, gamma: Tensor | None, angles: Sequence[Tensor], eps: float, halved: bool
) -> Tensor:
    c = g_BNHD.to(_wide(x))
    if angles:
        cos, sin = angles
        c = _turned(c, cos, -sin, halved)
    if gamma is not None:
        wide = x.unflatten(-1, (-1, g_BNHD.shape[-1])).to(c.dtype)
        rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        c, xhat = c * gamma, wide * rstd
        c = rstd * (c - xhat * (c * xhat).mean(-1, keepdim=True))
    return c.to(x.dtype).flatten(2)


@cache
def _kernels() -> ModuleType:
    """Imported at the first call: Triton may be missing."""
    from alignprop_fast.kernels import qk_norm_rope as kernels

    return kernels


def _launch_forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    return _kernels().qk_norm_rope_forward(*inputs)


def _launch_backward(*inputs: Any) -> list[Tensor]:
    return _kernels().qk_norm_rope_backward(*inputs)


def _fake_forward(
    projections: list[Tensor], gammas: list[Tensor], angles: list[Tensor], head_dim: int, eps: float, halved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = sum(x.shape[1] for x in projections[::3])
    q, k, v = (x.new_empty((x.shape[0], total, x.shape[2] // head_dim, head_dim)) for x in projections[:3])
    return q, k, v if len(projections) > 3 else v.new_empty(0)


def _fake_backward(
    dq: Tensor,
    dk: Tensor,
    projections: list[Tensor],
    gammas: list[Tensor],
    angles: list[Tensor],
    eps: float,
    halved: bool,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for index, x in enumerate(projections) if index % 3 < 2]


_triton_forward = Launch("qk_norm_rope_forward", "qk_norm_rope", _launch_forward, _plain_forward, _fake_forward)
_triton_backward = Launch("qk_norm_rope_backward", "qk_norm_rope", _launch_backward, _plain_backward, _fake_backward)


def prepared(form: Form, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of the whole sequence, [B, S, H, D], without gradient. v of a single part is a view."""
    served = backend(tensors[0], form.head_dim) == "triton"
    return _prepared_by(_triton_forward if served else _plain_forward, form, tensors)


def _prepared_by(
    run: Callable[..., tuple[Tensor, Tensor, Tensor | None]], form: Form, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    projections, gammas, angles = form.split(tensors)
    q, k, v = run(projections, gammas, angles, form.head_dim, form.eps, form.halved)
    # A single part's values are a view. A traced call returns an empty tensor for them.
    return q, k, projections[2].unflatten(-1, (-1, form.head_dim)) if v is None or form.parts == 1 else v


def gradients(form: Form, tensors: Sequence[Tensor], dq: Tensor, dk: Tensor, dv: Tensor) -> list[Tensor | None]:
    """Gradients of `tensors` from those of `prepared`; None for scales and angles."""
    projections, gammas, angles = form.split(tensors)
    run = _triton_backward if backend(tensors[0], form.head_dim) == "triton" else _plain_backward
    pairs = run(dq, dk, projections, gammas, angles, form.eps, form.halved)
    values = dv.split([x.shape[1] for x in projections[2::3]], dim=1)
    found = [t for part, value in enumerate(values) for t in (*pairs[2 * part : 2 * part + 2], value.flatten(2))]
    return [*found, *[None] * (len(tensors) - len(found))]


class _QKNormRope(Function):
    @staticmethod
    def forward(ctx: Any, form: Form, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        ctx.form = form
        return prepared(form, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gradients(ctx.form, ctx.saved_tensors, dq, dk, dv)


def qk_norm_rope(
    parts: Sequence[Part], head_dim: int, eps: float, halved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and turned q and k and the values of a sequence that consists of these parts, in this order.

    Differentiable in the projections. Attention does the same with less kept: `ops.attention.attention_of_parts`.

    Args:
        parts: in the order of the sequence, S tokens together, in one dtype; last stride 1.
        head_dim: D, even.
        eps: added to the mean square.
        halved: whether a pair is one channel of each half of a head (i, i + D / 2), or two neighbours (2i, 2i + 1).

    Returns:
        q, k, v [B, S, H, D] in their dtype.

    Raises:
        ValueError: only some of the parts have scales, or angles.
    """
    form, tensors = form_of(parts, head_dim, eps, halved), tensors_of(parts)
    return _QKNormRope.apply(form, *tensors) if torch.is_grad_enabled() else prepared(form, tensors)
