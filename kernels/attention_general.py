"""Attention over any number of keys. `kernels.attention` has the formulas and shapes.

Forward: one program per block of queries walks over the keys with a running maximum and sum. Backward (Dao 2023,
section 3.1, in two kernels): the first kernel has a program per block of queries and computes dq and delta; the second
has a program per block of keys and computes dk and dv. Every output has one writer, so there are no atomics and two
runs give the same bits.

The walk over keys takes whole blocks without masks, then what is left with masks. The second walk is a loop of at most
one turn: in a straight line, the compiler holds more in registers and spills. Its one stage keeps the pipeline out of
it. The walk over queries masks only loads, which costs three instructions, so it is one loop.

Padded keys: each batch element has a number of valid keys, which takes the place of N in the walks over keys. Programs
whose keys are all padding walk over no queries and store zeros.
"""

from itertools import product

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.attention_tiles import (
    REPORTED_HEAD_DIMS,
    REPORTED_TYPES,
    add_product,
    capability,
    common_alignment,
    head_tiles,
    load_pair,
    row_dots,
    row_numbers,
    rows_by_rows,
    rows_first,
    scaled_strides,
    signature_entry,
    store_pair,
    zeros_pair,
)
from alignprop_fast.kernels.launch import Prepared, cdiv

# table -> kernel -> rows of (largest padded head dimension; BLOCK_M, BLOCK_N, warps, stages). These are the largest
# blocks that spill no register and fit into shared memory: 99 KiB, or 227 KiB on Hopper.
CONFIGS = {
    "half": {
        "forward": [(64, 128, 64, 4, 3), (96, 64, 64, 4, 3), (128, 64, 64, 4, 2), (160, 64, 32, 4, 2)],
        "dq": [(64, 64, 64, 4, 2), (128, 64, 32, 4, 2), (160, 64, 16, 4, 2)],
        "dk_dv": [(96, 32, 64, 4, 2), (128, 32, 64, 8, 2), (160, 16, 64, 8, 2)],
    },
    "half sm_90": {
        "forward": [(64, 128, 128, 8, 3), (128, 128, 64, 8, 3), (160, 128, 64, 8, 2)],
        "dq": [(160, 128, 64, 8, 2)],
        "dk_dv": [(80, 64, 128, 8, 2), (160, 64, 64, 8, 2)],
    },
    # fp32 uses no tensor cores: multiply-adds hold whole operands in registers.
    "fp32": {
        "forward": [(64, 32, 32, 8, 1), (160, 16, 16, 8, 1)],
        "dq": [(64, 32, 32, 8, 1), (160, 16, 16, 8, 1)],
        "dk_dv": [(32, 16, 16, 8, 1), (64, 32, 16, 8, 1), (160, 16, 16, 8, 1)],
    },
}
# Not specialised, so that a new shape needs no new compilation. ALIGN tells the compiler the alignment of strides.
_PLAIN = ["H", "M", "N"] + [f"{t}_{axis}" for t in "qkvgo" for axis in "bhr"]


@triton.jit
def _add_keys(
    o0, o1, top, total, q0, q1, k_ptr, v_ptr, start, k_r, v_r, N, scale2, HEAD: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, ALIGN: tl.constexpr, MASK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(o, top, total) after one more block of keys. `top` is the running maximum of s scale2, `total` the sum."""
    keys = start + tl.arange(0, BLOCK_N)
    k0, k1 = load_pair(k_ptr, keys, k_r * ALIGN, N, HEAD, D0, D1, MASK)
    s = rows_by_rows(q0, q1, k0, k1, D1)
    if MASK:
        s = tl.where(keys[None, :] < N, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale2)
    shrink = tl.exp2(top - new_top)
    # One multiply-add for each exponent: only the maximum is scaled before.
    p = tl.exp2(s * scale2 - new_top[:, None])
    total = total * shrink + tl.sum(p, 1)
    o0 = o0 * shrink[:, None]
    if D1 > 0:
        o1 = o1 * shrink[:, None]
    v0, v1 = load_pair(v_ptr, keys, v_r * ALIGN, N, HEAD, D0, D1, MASK)
    o0, o1 = add_product(o0, o1, p, v0, v1, D1)
    return o0, o1, new_top, total


@triton.jit(do_not_specialize=[name for name in _PLAIN if name[0] not in "go"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lengths_ptr, scale, q_b, q_h, q_r, k_b, k_h, k_r, v_b, v_h, v_r, H, M, N,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries against all keys, with a running maximum and sum."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    q_ptr += (b * q_b + h * q_h) * ALIGN
    k_ptr += (b * k_b + h * k_h) * ALIGN
    v_ptr += (b * v_b + h * v_h) * ALIGN
    q0, q1 = load_pair(q_ptr, rows, q_r * ALIGN, M, HEAD, D0, D1, True)
    o0, o1 = zeros_pair(BLOCK_M, D0, D1)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    # The hardware computes exponentials in base 2.
    scale2 = scale * 1.4426950408889634
    if PADDED:
        N = tl.load(lengths_ptr + b)
    whole = N // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        o0, o1, top, total = _add_keys(
            *(o0, o1, top, total, q0, q1, k_ptr, v_ptr, start),
            *(k_r, v_r, N, scale2, HEAD, D0, D1, ALIGN, False, BLOCK_N),
        )
    for start in tl.range(whole, N, BLOCK_N, num_stages=1):
        o0, o1, top, total = _add_keys(
            *(o0, o1, top, total, q0, q1, k_ptr, v_ptr, start),
            *(k_r, v_r, N, scale2, HEAD, D0, D1, ALIGN, True, BLOCK_N),
        )
    o0 = o0 / total[:, None]
    if D1 > 0:
        o1 = o1 / total[:, None]
    tl.store(lse_ptr + head * M + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=rows < M)
    store_pair(o_ptr + (b * M * H + h) * HEAD, o0, o1, rows, H * HEAD, M, HEAD, D0, D1)


@triton.jit
def _add_dq(
    dq0, dq1, q0, q1, g0, g1, lse2, delta, k_ptr, v_ptr, start, k_r, v_r, N, scale2, HEAD: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, MASK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq / scale after one more block of keys."""
    keys = start + tl.arange(0, BLOCK_N)
    k0, k1 = load_pair(k_ptr, keys, k_r * ALIGN, N, HEAD, D0, D1, MASK)
    v0, v1 = load_pair(v_ptr, keys, v_r * ALIGN, N, HEAD, D0, D1, MASK)
    s = rows_by_rows(q0, q1, k0, k1, D1)
    if MASK:
        s = tl.where(keys[None, :] < N, s, float("-inf"))
    p = tl.exp2(s * scale2 - lse2[:, None])
    ds = p * (rows_by_rows(g0, g1, v0, v1, D1) - delta[:, None])
    return add_product(dq0, dq1, ds, k0, k1, D1)


@triton.jit(do_not_specialize=_PLAIN)
def attention_backward_dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, dq_ptr, delta_ptr, lengths_ptr, scale,
    g_b, g_h, g_r, q_b, q_h, q_r, k_b, k_h, k_r, v_b, v_h, v_r, o_b, o_h, o_r, H, M, N,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, and its delta, which the next kernel reads."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    k_ptr += (b * k_b + h * k_h) * ALIGN
    v_ptr += (b * v_b + h * v_h) * ALIGN
    q0, q1 = load_pair(q_ptr + (b * q_b + h * q_h) * ALIGN, rows, q_r * ALIGN, M, HEAD, D0, D1, True)
    g0, g1 = load_pair(g_ptr + (b * g_b + h * g_h) * ALIGN, rows, g_r * ALIGN, M, HEAD, D0, D1, True)
    o0, o1 = load_pair(o_ptr + (b * o_b + h * o_h) * ALIGN, rows, o_r * ALIGN, M, HEAD, D0, D1, True)
    delta = row_dots(g0, g1, o0, o1, D1)
    tl.store(delta_ptr + head * M + rows, delta, mask=rows < M)
    lse2 = tl.load(lse_ptr + head * M + rows, mask=rows < M, other=0.0) * 1.4426950408889634
    scale2 = scale * 1.4426950408889634
    dq0, dq1 = zeros_pair(BLOCK_M, D0, D1)
    if PADDED:
        N = tl.load(lengths_ptr + b)
    whole = N // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        dq0, dq1 = _add_dq(
            *(dq0, dq1, q0, q1, g0, g1, lse2, delta, k_ptr, v_ptr, start),
            *(k_r, v_r, N, scale2, HEAD, D0, D1, ALIGN, False, BLOCK_N),
        )
    for start in tl.range(whole, N, BLOCK_N, num_stages=1):
        dq0, dq1 = _add_dq(
            *(dq0, dq1, q0, q1, g0, g1, lse2, delta, k_ptr, v_ptr, start),
            *(k_r, v_r, N, scale2, HEAD, D0, D1, ALIGN, True, BLOCK_N),
        )
    store_pair(dq_ptr + (b * M * H + h) * HEAD, dq0 * scale, dq1 * scale, rows, H * HEAD, M, HEAD, D0, D1)


@triton.jit
def _add_dk_dv(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr, g_ptr, lse_ptr, delta_ptr, start, q_r, g_r, M, scale2,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(dk / scale, dv) after one more block of queries. S is transposed, so that P^T and dS^T need no transposition."""
    rows = start + tl.arange(0, BLOCK_M)
    q0, q1 = load_pair(q_ptr, rows, q_r * ALIGN, M, HEAD, D0, D1, MASK)
    g0, g1 = load_pair(g_ptr, rows, g_r * ALIGN, M, HEAD, D0, D1, MASK)
    if MASK:
        # Beyond the last query q and g are zero, so these rows add zero as long as their P is finite.
        lse = tl.load(lse_ptr + rows, mask=rows < M, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=rows < M, other=0.0)
    else:
        lse = tl.load(lse_ptr + rows)
        delta = tl.load(delta_ptr + rows)
    s_T = rows_by_rows(k0, k1, q0, q1, D1) * scale2
    p_T = tl.exp2(s_T - (lse * 1.4426950408889634)[None, :])
    dv0, dv1 = add_product(dv0, dv1, p_T, g0, g1, D1)
    ds_T = p_T * (rows_by_rows(v0, v1, g0, g1, D1) - delta[None, :])
    dk0, dk1 = add_product(dk0, dk1, ds_T, q0, q1, D1)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=[name for name in _PLAIN if name[0] != "o"])
def attention_backward_dk_dv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, lengths_ptr, scale,
    g_b, g_h, g_r, q_b, q_h, q_r, k_b, k_h, k_r, v_b, v_h, v_r, H, M, N,
    HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, PADDED: tl.constexpr,
    MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys.

    MASK: M is not a multiple of BLOCK_M. Keys beyond the last affect only their own rows, which are not stored, or
    stored as zeros if they are padding.
    """
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    q_ptr += (b * q_b + h * q_h) * ALIGN
    g_ptr += (b * g_b + h * g_h) * ALIGN
    lse_ptr += head * M
    delta_ptr += head * M
    k0, k1 = load_pair(k_ptr + (b * k_b + h * k_h) * ALIGN, keys, k_r * ALIGN, N, HEAD, D0, D1, True)
    v0, v1 = load_pair(v_ptr + (b * v_b + h * v_h) * ALIGN, keys, v_r * ALIGN, N, HEAD, D0, D1, True)
    dk0, dk1 = zeros_pair(BLOCK_N, D0, D1)
    dv0, dv1 = zeros_pair(BLOCK_N, D0, D1)
    scale2 = scale * 1.4426950408889634
    stop = M
    if PADDED:
        valid = tl.load(lengths_ptr + b)
        stop = tl.where(tl.program_id(0) * BLOCK_N < valid, M, 0)
    for start in range(0, stop, BLOCK_M):
        dk0, dk1, dv0, dv1 = _add_dk_dv(
            *(dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr, g_ptr, lse_ptr, delta_ptr, start),
            *(q_r, g_r, M, scale2, HEAD, D0, D1, ALIGN, MASK, BLOCK_M),
        )
    if PADDED:
        inside = (keys < valid)[:, None]
        dk0, dv0 = tl.where(inside, dk0, 0.0), tl.where(inside, dv0, 0.0)
        if D1 > 0:
            dk1, dv1 = tl.where(inside, dk1, 0.0), tl.where(inside, dv1, 0.0)
    out = (b * N * H + h) * HEAD
    store_pair(dk_ptr + out, dk0 * scale, dk1 * scale, keys, H * HEAD, N, HEAD, D0, D1)
    store_pair(dv_ptr + out, dv0, dv1, keys, H * HEAD, N, HEAD, D0, D1)


class Forward:
    """The forward pass on tensors of certain sizes and strides; arguments as of `attention.attention_forward`."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, lengths: torch.Tensor | None = None
    ):
        (b, h, m, d), n, align = q.shape, k.shape[2], common_alignment(q, k, v)
        block_m, block_n, warps, stages = config(table(q), "forward", d)
        self._start = Prepared(
            *(attention_forward_kernel, (cdiv(m, block_m), b * h), scale),
            *(stride for t in (q, k, v) for stride in scaled_strides(t, align)),
            *(h, m, n, d, *head_tiles(d), align, lengths is not None, block_m, block_n),
            num_warps=warps,
            num_stages=stages,
        )

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(o, lse)."""
        o, lse = rows_first(q), row_numbers(q)
        self._start(q, k, v, o, lse, q if lengths is None else lengths)
        return o, lse


class Backward:
    """The backward pass on tensors of certain sizes and strides; arguments as of `attention.attention_backward`."""

    def __init__(
        self,
        g: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        scale: float,
        lengths: torch.Tensor | None = None,
    ):
        (b, h, m, d), n, align = q.shape, k.shape[2], common_alignment(g, q, k, v, o)
        strides = [stride for t in (g, q, k, v, o) for stride in scaled_strides(t, align)]
        sizes = (h, m, n, d, *head_tiles(d), align, lengths is not None)
        block_m, block_n, warps, stages = config(table(q), "dq", d)
        self._start_dq = Prepared(
            *(attention_backward_dq_kernel, (cdiv(m, block_m), b * h), scale, *strides, *sizes, block_m, block_n),
            num_warps=warps,
            num_stages=stages,
        )
        block_m, block_n, warps, stages = config(table(q), "dk_dv", d)
        self._start_dk_dv = Prepared(
            *(attention_backward_dk_dv_kernel, (cdiv(n, block_n), b * h), scale, *strides[:12], *sizes),
            *(m % block_m != 0, block_m, block_n),
            num_warps=warps,
            num_stages=stages,
        )

    def __call__(
        self,
        g: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        lse: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv)."""
        dq, dk, dv, delta = rows_first(q), rows_first(k), rows_first(v), torch.empty_like(lse)
        valid = q if lengths is None else lengths
        self._start_dq(g, q, k, v, o, lse, dq, delta, valid)
        self._start_dk_dv(g, q, k, v, lse, delta, dk, dv, valid)
        return dq, dk, dv


def table(q: torch.Tensor) -> str:
    """The table of CONFIGS for a tensor's dtype and GPU."""
    if q.dtype == torch.float32:
        return "fp32"
    return "half sm_90" if capability(q.device) == 90 else "half"


def config(table: str, kernel: str, head_dim: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages) of the first row of the table that fits this head dimension."""
    return next(row[1:] for row in CONFIGS[table][kernel] if sum(head_tiles(head_dim)) <= row[0])


def signatures() -> list[dict]:
    """Entries to compile ahead of time (`attention_tiles.signature_entry`), at REPORTED_HEAD_DIMS.

    With padding at 128 alone, the heads of the models whose texts are padded.
    """
    kernels = {
        "forward": attention_forward_kernel,
        "dq": attention_backward_dq_kernel,
        "dk_dv": attention_backward_dk_dv_kernel,
    }
    found = []
    dims = [*((d, False) for d in REPORTED_HEAD_DIMS), (128, True)]
    for name, kernel, (d, padded) in product(CONFIGS, kernels, dims):
        dtype, archs = REPORTED_TYPES[name]
        block_m, block_n, warps, stages = config(name, kernel, d)
        constexprs = dict(zip(("D0", "D1"), head_tiles(d), strict=True))
        constexprs |= {"HEAD": d, "ALIGN": 8, "PADDED": padded, "BLOCK_M": block_m, "BLOCK_N": block_n}
        constexprs |= {"MASK": True} if kernel == "dk_dv" else {}
        label = f"{dtype} d{d}{' padded' if padded else ''} {block_m}x{block_n}"
        found.append(signature_entry(kernels[kernel], label, dtype, constexprs, warps, stages, archs))
    return found
