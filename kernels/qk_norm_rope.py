"""RMSNorm of queries and keys and rotary positions, written into the buffers of a joint sequence, in one pass.

Forward, for each token and head (Zhang & Sennrich 2019, eq. 4; Su et al. 2021, eq. 34), with x a query or a key:

    xhat = rstd x,   rstd = (mean(x^2) + eps)^-1/2        y = R (gamma * xhat)

R turns pairs (a, b) of channels: (a cos - b sin, a sin + b cos). A pair is two neighbours (2i, 2i + 1), or one channel
of each half (i, i + D/2). Values are copied beside them if the sequence has several parts. Backward, for a gradient g
of y, with gamma frozen and rstd computed again:

    c = gamma * R^T g        dx = rstd (c - xhat * mean(c * xhat))

Shapes: projections [B, N, H D], last stride 1; joint buffers [B, S, H, D], into whose rows `start` to `start` + N they
go; gamma [D]; cos, sin [B or 1, N, D/2] with any strides, so that real and imaginary parts of complex numbers serve as
they are. Everything is computed in fp32 and rounded once. Elements moved, with n = B N H D: forward 4 n (6 n with
values), backward 6 n. Memory is the bound. A program holds the angles of some tokens and walks over heads, so angles
are read once for several heads. It loses for a head dimension that is not a power of two (idle lanes) and for few
tokens, which do not fill the chip.
"""

from functools import cache
from itertools import product

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.launch import Prepared, cdiv, next_power_of_2

HEADS = 8  # walked over by one program
# (largest padded head dimension, tokens per program, warps): a thread takes 16 elements.
CONFIGS = [(32, 64, 4), (64, 32, 4), (128, 16, 4), (256, 8, 4)]
MAX_HEAD_DIM = CONFIGS[-1][0]


@triton.jit
def _load_pairs(base, row, row_stride, inside, HEAD: tl.constexpr, PAIRS: tl.constexpr, HALVED: tl.constexpr):
    """First and second channels of the pairs of some rows, [rows, PAIRS] each, in fp32."""
    if HALVED:
        col = tl.arange(0, PAIRS)
        mask = inside[:, None] & (col[None, :] < HEAD // 2)
        at = base + row[:, None] * row_stride + col[None, :]
        a = tl.load(at, mask=mask, other=0.0)
        b = tl.load(at + HEAD // 2, mask=mask, other=0.0)
    else:
        col = tl.arange(0, 2 * PAIRS)
        mask = inside[:, None] & (col[None, :] < HEAD)
        x = tl.load(base + row[:, None] * row_stride + col[None, :], mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(x, [x.shape[0], PAIRS, 2]))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(base, row, row_stride, inside, a, b, HEAD: tl.constexpr, PAIRS: tl.constexpr, HALVED: tl.constexpr):
    a, b = a.to(base.dtype.element_ty), b.to(base.dtype.element_ty)
    if HALVED:
        col = tl.arange(0, PAIRS)
        mask = inside[:, None] & (col[None, :] < HEAD // 2)
        at = base + row[:, None] * row_stride + col[None, :]
        tl.store(at, a, mask=mask)
        tl.store(at + HEAD // 2, b, mask=mask)
    else:
        col = tl.arange(0, 2 * PAIRS)
        mask = inside[:, None] & (col[None, :] < HEAD)
        x = tl.reshape(tl.join(a, b), [a.shape[0], 2 * PAIRS])
        tl.store(base + row[:, None] * row_stride + col[None, :], x, mask=mask)


@triton.jit
def _load_scale(gamma_ptr, HEAD: tl.constexpr, PAIRS: tl.constexpr, HALVED: tl.constexpr):
    """gamma as pairs, [1, PAIRS] each."""
    one = tl.arange(0, 1)
    return _load_pairs(gamma_ptr, one, 0, one == 0, HEAD, PAIRS, HALVED)


@triton.jit
def _tokens(
    cos_ptr, sin_ptr, angle_b, angle_n, angle_p, N,
    HEAD: tl.constexpr, PAIRS: tl.constexpr, TURN: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """(batch element, rows of this program's tokens, which of them exist, cos and sin [rows, PAIRS] of their pairs)."""
    b = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = row < N
    if TURN:
        pair = tl.arange(0, PAIRS)
        mask = inside[:, None] & (pair[None, :] < HEAD // 2)
        at = row[:, None] * angle_n + pair[None, :] * angle_p
        cos = tl.load(cos_ptr + b * angle_b + at, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + b * angle_b + at, mask=mask, other=0.0).to(tl.float32)
    else:
        cos, sin = 0.0, 0.0
    return b, row, inside, cos, sin


@triton.jit
def _prepared(
    x_ptr, y_ptr, gamma_ptr, first, heads, eps, cos, sin, row, x_row, y_row, inside,
    HEAD: tl.constexpr, PAIRS: tl.constexpr, HALVED: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """y of some tokens and of the heads from `first`."""
    if NORM:
        gamma_a, gamma_b = _load_scale(gamma_ptr, HEAD, PAIRS, HALVED)
    for head in range(first, tl.minimum(first + HEADS, heads)):
        a, b = _load_pairs(x_ptr + head * HEAD, row, x_row, inside, HEAD, PAIRS, HALVED)
        if NORM:
            rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / HEAD + eps)[:, None]
            a, b = a * rstd * gamma_a, b * rstd * gamma_b
        if TURN:
            a, b = a * cos - b * sin, a * sin + b * cos
        _store_pairs(y_ptr + head * HEAD, row, y_row, inside, a, b, HEAD, PAIRS, HALVED)


@triton.jit
def qk_norm_rope_forward_kernel(
    q_ptr, k_ptr, v_ptr, q_gamma_ptr, k_gamma_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr, q_b, q_n, k_b,
    k_n, v_b, v_n, angle_b, angle_n, angle_p, start, N, S, q_heads, k_heads, eps,
    HEAD: tl.constexpr, PAIRS: tl.constexpr, HALVED: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
    COPY: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Some tokens and heads of one part. COPY: values go into the joint buffer too."""
    b, row, inside, cos, sin = _tokens(cos_ptr, sin_ptr, angle_b, angle_n, angle_p, N, HEAD, PAIRS, TURN, TOKENS)
    first = tl.program_id(1) * HEADS
    into = (b * S + start) * HEAD
    _prepared(
        *(q_ptr + b * q_b, q_out_ptr + into * q_heads, q_gamma_ptr, first, q_heads, eps, cos, sin),
        *(row, q_n, q_heads * HEAD, inside, HEAD, PAIRS, HALVED, NORM, TURN, HEADS),
    )
    _prepared(
        *(k_ptr + b * k_b, k_out_ptr + into * k_heads, k_gamma_ptr, first, k_heads, eps, cos, sin),
        *(row, k_n, k_heads * HEAD, inside, HEAD, PAIRS, HALVED, NORM, TURN, HEADS),
    )
    if COPY:
        _prepared(
            *(v_ptr + b * v_b, v_out_ptr + into * k_heads, k_gamma_ptr, first, k_heads, eps, cos, sin),
            *(row, v_n, k_heads * HEAD, inside, HEAD, PAIRS, True, False, False, HEADS),
        )


@triton.jit
def _gradient(
    g_ptr, x_ptr, dx_ptr, gamma_ptr, first, heads, eps, cos, sin, row, g_row, g_head, x_row, inside,
    HEAD: tl.constexpr, PAIRS: tl.constexpr, HALVED: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """dx of some tokens and of the heads from `first`."""
    if NORM:
        gamma_a, gamma_b = _load_scale(gamma_ptr, HEAD, PAIRS, HALVED)
    for head in range(first, tl.minimum(first + HEADS, heads)):
        a, b = _load_pairs(g_ptr + head * g_head, row, g_row, inside, HEAD, PAIRS, HALVED)
        if TURN:
            a, b = a * cos + b * sin, b * cos - a * sin
        if NORM:
            x_a, x_b = _load_pairs(x_ptr + head * HEAD, row, x_row, inside, HEAD, PAIRS, HALVED)
            rstd = tl.rsqrt(tl.sum(x_a * x_a + x_b * x_b, 1) / HEAD + eps)[:, None]
            a, b, x_a, x_b = a * gamma_a, b * gamma_b, x_a * rstd, x_b * rstd
            along = (tl.sum(a * x_a + b * x_b, 1) / HEAD)[:, None]
            a, b = (a - x_a * along) * rstd, (b - x_b * along) * rstd
        _store_pairs(dx_ptr + head * HEAD, row, heads * HEAD, inside, a, b, HEAD, PAIRS, HALVED)


@triton.jit
def qk_norm_rope_backward_kernel(
    dq_ptr, dk_ptr, q_ptr, k_ptr, q_gamma_ptr, k_gamma_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, dq_b, dq_n, dq_h,
    dk_b, dk_n, dk_h, q_b, q_n, k_b, k_n, angle_b, angle_n, angle_p, N, q_heads, k_heads, eps,
    HEAD: tl.constexpr, PAIRS: tl.constexpr, HALVED: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Gradients of the projections of one part, some tokens and heads; dq and dk point to the part's first row."""
    b, row, inside, cos, sin = _tokens(cos_ptr, sin_ptr, angle_b, angle_n, angle_p, N, HEAD, PAIRS, TURN, TOKENS)
    first = tl.program_id(1) * HEADS
    _gradient(
        *(dq_ptr + b * dq_b, q_ptr + b * q_b, q_out_ptr + b * N * q_heads * HEAD, q_gamma_ptr, first, q_heads, eps),
        *(cos, sin, row, dq_n, dq_h, q_n, inside, HEAD, PAIRS, HALVED, NORM, TURN, HEADS),
    )
    _gradient(
        *(dk_ptr + b * dk_b, k_ptr + b * k_b, k_out_ptr + b * N * k_heads * HEAD, k_gamma_ptr, first, k_heads, eps),
        *(cos, sin, row, dk_n, dk_h, k_n, inside, HEAD, PAIRS, HALVED, NORM, TURN, HEADS),
    )


@cache
def config(head_dim: int) -> tuple[int, int]:
    """(tokens per program, warps) for this head dimension. Raises ValueError above MAX_HEAD_DIM or if it is odd."""
    if head_dim % 2:
        raise ValueError(f"qk_norm_rope turns pairs of channels: the head dimension {head_dim} must be even")
    for largest, tokens, warps in CONFIGS:
        if head_dim <= largest:
            return tokens, warps
    raise ValueError(f"qk_norm_rope holds a head in registers: at most {MAX_HEAD_DIM} channels, not {head_dim}")


@cache
def _forward(
    sizes: tuple[int, int, int, int],
    heads: tuple[int, int],
    strides: tuple[int, ...],
    head_dim: int,
    eps: float,
    halved: bool,
    normed: bool,
    turned: bool,
    joins: bool,
) -> Prepared:
    """Takes q, k, v, both scales, cos, sin, and the sequence's q, k and v.

    sizes: batch, first token of the part, its tokens, those of the sequence. strides: of q, k, v and the angles.
    """
    tokens, warps = config(head_dim)
    batch, _, count, _ = sizes
    return Prepared(
        *(qk_norm_rope_forward_kernel, (cdiv(count, tokens), cdiv(max(heads), HEADS), batch)),
        *(*strides, *sizes[1:], *heads, eps),
        *(head_dim, next_power_of_2(head_dim // 2), halved, normed, turned, joins, HEADS, tokens),
        num_warps=warps,
    )


@cache
def _backward(
    sizes: tuple[int, int],
    heads: tuple[int, int],
    strides: tuple[int, ...],
    head_dim: int,
    eps: float,
    halved: bool,
    normed: bool,
    turned: bool,
) -> Prepared:
    """Takes dq, dk, q, k, both scales, cos, sin, and the gradients of q and k.

    sizes: batch and tokens. strides: of the first four and the angles.
    """
    tokens, warps = config(head_dim)
    batch, count = sizes
    return Prepared(
        *(qk_norm_rope_backward_kernel, (cdiv(count, tokens), cdiv(max(heads), HEADS), batch)),
        *(*strides, count, *heads, eps),
        *(head_dim, next_power_of_2(head_dim // 2), halved, normed, turned, HEADS, tokens),
        num_warps=warps,
    )


def qk_norm_rope_forward(
    projections: list[torch.Tensor],
    gammas: list[torch.Tensor],
    angles: list[torch.Tensor],
    head_dim: int,
    eps: float,
    halved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch the forward kernel, once for each part of the sequence.

    Args:
        projections: q, k and v of each part, [B, N, H D] each.
        gammas: scales [D] of q and k of each part; empty: no norm.
        angles: cos and sin [B or 1, N, D / 2] of each part; empty: no rotation.
        halved: whether a pair is one channel of each half; else two neighbours.

    Returns:
        q, k and v of the sequence, [B, S, H, D]; v is None if there is only one part.
    """
    projections = [t if t.stride(-1) == 1 else t.contiguous() for t in projections]
    joins = len(projections) > 3
    q, k, _ = projections[:3]
    batch, total = len(q), sum(t.shape[1] for t in projections[::3])
    heads = q.shape[2] // head_dim, k.shape[2] // head_dim
    out_q, out_k = (q.new_empty(batch, total, count, head_dim) for count in heads)
    out_v = torch.empty_like(out_k) if joins else None
    out = out_q, out_k, out_k if out_v is None else out_v
    start = 0
    for part in range(len(projections) // 3):
        q, k, v = projections[3 * part : 3 * part + 3]
        cos, sin, of_angles = _angles(angles[2 * part : 2 * part + 2], q)
        strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *of_angles)
        sizes = batch, start, q.shape[1], total
        run = _forward(sizes, heads, strides, head_dim, eps, halved, bool(gammas), bool(angles), joins)
        run(q, k, v, *(gammas[2 * part : 2 * part + 2] or (q, k)), cos, sin, *out)
        start += q.shape[1]
    return out_q, out_k, out_v


def qk_norm_rope_backward(
    dq_BSHD: torch.Tensor,
    dk_BSHD: torch.Tensor,
    projections: list[torch.Tensor],
    gammas: list[torch.Tensor],
    angles: list[torch.Tensor],
    eps: float,
    halved: bool,
) -> list[torch.Tensor]:
    """Launch the backward kernel, once for each part: the gradients of q and k of each part, [B, N, H D].

    dq_BSHD, dk_BSHD: gradients of the forward pass's q and k, any strides. Others as there.
    """
    head_dim = dq_BSHD.shape[3]
    dq, dk, *projections = (t if t.stride(-1) == 1 else t.contiguous() for t in (dq_BSHD, dk_BSHD, *projections))
    heads = dq.shape[2], dk.shape[2]
    found: list[torch.Tensor] = []
    start = 0
    for part in range(len(projections) // 3):
        q, k, _ = projections[3 * part : 3 * part + 3]
        cos, sin, of_angles = _angles(angles[2 * part : 2 * part + 2], q)
        gs = dq[:, start:], dk[:, start:]
        outs = q.new_empty(*q.shape), k.new_empty(*k.shape)
        strides = (*dq.stride()[:3], *dk.stride()[:3], *q.stride()[:2], *k.stride()[:2], *of_angles)
        sizes = len(q), q.shape[1]
        run = _backward(sizes, heads, strides, head_dim, eps, halved, bool(gammas), bool(angles))
        run(*gs, q, k, *(gammas[2 * part : 2 * part + 2] or (q, k)), cos, sin, *outs)
        found += outs
        start += q.shape[1]
    return found


def _angles(pair: list[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, int]]:
    """(cos, sin, their strides); any tensors if there are none."""
    if not pair:
        return x, x, (0, 0, 0)
    cos, sin = pair if pair[0].stride() == pair[1].stride() else (t.contiguous() for t in pair)
    batch, row, pairs = cos.stride()
    return cos, sin, (batch if len(cos) > 1 else 0, row, pairs)


def signatures() -> list[dict]:
    """Every shipped configuration with norm and rotation, at its largest head, in both forms of rotation."""
    entries = []
    kernels = (qk_norm_rope_forward_kernel, qk_norm_rope_backward_kernel)
    for kernel, dtype, (head_dim, tokens, warps), halved in product(kernels, ("bf16", "fp32"), CONFIGS, (False, True)):
        given = {"HEAD": head_dim, "PAIRS": head_dim // 2, "HALVED": halved, "HEADS": HEADS, "TOKENS": tokens}
        given |= dict.fromkeys(("NORM", "TURN", "COPY"), True)
        constexprs = {name: value for name, value in given.items() if name in kernel.arg_names}
        types = {"eps": "fp32", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
        names = [name for name in kernel.arg_names if name not in constexprs]
        own = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in names}
        entries.append(
            {
                "kernel": kernel,
                "config": f"{dtype} {tokens}x{head_dim}{' halved' if halved else ''} w{warps}",
                "signature": own | {name: kind for name, kind in types.items() if name in own},
                "constexprs": constexprs,
                "num_warps": warps,
                "num_stages": 1,
                "arch": None,
            }
        )
    return entries
