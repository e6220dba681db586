"""Attention over few keys, such as the 77 tokens of a text. `kernels.attention` has the formulas and shapes.

One program holds all keys and values of a head, so no running softmax is needed. Backward, one pass over the queries
gives all three gradients; delta_i is computed as sum_j P_ij (g v^T)_ij, which is the same number and does not need o.
To fill the chip, the queries are split. Each program walks over its share, stores dq, and leaves its sums for dk and dv
in fp32. A second kernel adds these sums in a fixed order. With B H = 20, kernels with one program per 128 keys and head
have 20 programs; this one has up to two per multiprocessor.

The number of keys is padded to the sum of two powers of two, like head dimensions (77 to 64 + 16, not to 128).

FLOPs per head, in units of 2 M N D: forward 2, backward 5. Bytes per head: forward 2 (M + N) D elements, backward
3 M D + 2 N D, and 16 N D per split for the partial sums, written and read. Sums are fp32.

Where it loses: if B H exceeds the number of multiprocessors, splitting gains nothing; with few queries, the second
launch costs more than it saves; with large heads, the sums do not fit the registers. The general kernels serve D above
80 backward, D above 128 forward (above 80 with more than 80 keys), and fp32.
"""

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.attention_tiles import (
    REPORTED_HEAD_DIMS,
    add_product,
    common_alignment,
    head_tiles,
    load_pair,
    row_numbers,
    rows_by_rows,
    rows_first,
    scaled_strides,
    signature_entry,
    store_pair,
    zeros_pair,
)
from alignprop_fast.kernels.launch import Prepared, cdiv, next_power_of_2

MAX_KEYS = 128
REDUCE_BLOCK = 512
# kernel -> rows of (largest D, largest N, both padded; BLOCK_M, warps, stages) for half types. No row spills a register
# or needs more than 99 KiB of shared memory. The general kernels serve fp32 and whatever fits no row.
CONFIGS = {
    "short_forward": [(80, 128, 64, 4, 1), (128, 80, 64, 4, 1)],
    "short_backward": [(64, 80, 32, 4, 3), (64, 128, 32, 8, 2), (80, 128, 16, 8, 3)],
}
_PLAIN = ["H", "M", "N", "blocks_per_split"] + [f"{t}_{axis}" for t in "qkvg" for axis in "bhr"]


@triton.jit(do_not_specialize=[name for name in _PLAIN if name[0] != "g"])
def attention_short_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, scale, q_b, q_h, q_r, k_b, k_h, k_r, v_b, v_h, v_r, H, M, N,
    HEAD: tl.constexpr, ALIGN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One block of queries against all keys at once."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    k_ptr += (b * k_b + h * k_h) * ALIGN
    v_ptr += (b * v_b + h * v_h) * ALIGN
    q0, q1 = load_pair(q_ptr + (b * q_b + h * q_h) * ALIGN, rows, q_r * ALIGN, M, HEAD, D0, D1, True)
    scale2 = scale * 1.4426950408889634
    keys = tl.arange(0, N0)
    # A second tile has only what the first cannot hold, so the first is full.
    k0, k1 = load_pair(k_ptr, keys, k_r * ALIGN, N, HEAD, D0, D1, N1 == 0)
    v0, v1 = load_pair(v_ptr, keys, v_r * ALIGN, N, HEAD, D0, D1, N1 == 0)
    s = rows_by_rows(q0, q1, k0, k1, D1)
    if N1 == 0:
        s = tl.where(keys[None, :] < N, s, float("-inf"))
    top = tl.max(s, 1)
    if N1 > 0:
        more_keys = N0 + tl.arange(0, N1)
        k0, k1 = load_pair(k_ptr, more_keys, k_r * ALIGN, N, HEAD, D0, D1, True)
        more_s = tl.where(more_keys[None, :] < N, rows_by_rows(q0, q1, k0, k1, D1), float("-inf"))
        top = tl.maximum(top, tl.max(more_s, 1))
    top *= scale2
    p = tl.exp2(s * scale2 - top[:, None])
    total = tl.sum(p, 1)
    o0, o1 = zeros_pair(BLOCK_M, D0, D1)
    o0, o1 = add_product(o0, o1, p, v0, v1, D1)
    if N1 > 0:
        p = tl.exp2(more_s * scale2 - top[:, None])
        total += tl.sum(p, 1)
        v0, v1 = load_pair(v_ptr, more_keys, v_r * ALIGN, N, HEAD, D0, D1, True)
        o0, o1 = add_product(o0, o1, p, v0, v1, D1)
    tl.store(lse_ptr + head * M + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=rows < M)
    store_pair(
        o_ptr + (b * M * H + h) * HEAD, o0 / total[:, None], o1 / total[:, None], rows, H * HEAD, M, HEAD, D0, D1
    )


@triton.jit
def _probabilities(q0, q1, g0, g1, lse2, k0, k1, v0, v1, keys, N, scale2, D1: tl.constexpr, MASK: tl.constexpr):
    """P^T and (g v^T)^T of some keys, [keys, rows], transposed so that the sums over rows need no transposition."""
    s_T = rows_by_rows(k0, k1, q0, q1, D1)
    if MASK:
        # Needed: exp2(0 - lse) of a missing key can be infinite, and infinity times zero would make dq NaN.
        s_T = tl.where(keys[:, None] < N, s_T, float("-inf"))
    return tl.exp2(s_T * scale2 - lse2[None, :]), rows_by_rows(v0, v1, g0, g1, D1)


@triton.jit
def _add_tile(
    dk0, dk1, dv0, dv1, dq0, dq1, p_T, dp_T, delta, q0, q1, g0, g1, k0, k1, D1: tl.constexpr
):  # fmt: skip
    """(dk, dv, dq) with what some rows and some keys add, without the scale."""
    dv0, dv1 = add_product(dv0, dv1, p_T, g0, g1, D1)
    ds_T = (p_T * (dp_T - delta[None, :])).to(q0.dtype)
    dk0, dk1 = add_product(dk0, dk1, ds_T, q0, q1, D1)
    dq0, dq1 = add_product(dq0, dq1, tl.trans(ds_T), k0, k1, D1)
    return dk0, dk1, dv0, dv1, dq0, dq1


@triton.jit(do_not_specialize=_PLAIN)
def attention_short_backward_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, dq_ptr, dk_parts_ptr, dv_parts_ptr, scale,
    g_b, g_h, g_r, q_b, q_h, q_r, k_b, k_h, k_r, v_b, v_h, v_r, H, M, N, blocks_per_split,
    HEAD: tl.constexpr, ALIGN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dq of one split of the queries and its part of dk and dv: [splits, B, N, H, D] in fp32."""
    split = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    k_ptr += (b * k_b + h * k_h) * ALIGN
    v_ptr += (b * v_b + h * v_h) * ALIGN
    q_ptr += (b * q_b + h * q_h) * ALIGN
    g_ptr += (b * g_b + h * g_h) * ALIGN
    dq_ptr += (b * M * H + h) * HEAD
    keys = tl.arange(0, N0)
    k0, k1 = load_pair(k_ptr, keys, k_r * ALIGN, N, HEAD, D0, D1, True)
    v0, v1 = load_pair(v_ptr, keys, v_r * ALIGN, N, HEAD, D0, D1, True)
    dk0, dk1 = zeros_pair(N0, D0, D1)
    dv0, dv1 = zeros_pair(N0, D0, D1)
    if N1 > 0:
        more_keys = N0 + tl.arange(0, N1)
        more_k0, more_k1 = load_pair(k_ptr, more_keys, k_r * ALIGN, N, HEAD, D0, D1, True)
        more_v0, more_v1 = load_pair(v_ptr, more_keys, v_r * ALIGN, N, HEAD, D0, D1, True)
        more_dk0, more_dk1 = zeros_pair(N1, D0, D1)
        more_dv0, more_dv1 = zeros_pair(N1, D0, D1)
    scale2 = scale * 1.4426950408889634
    first = split * blocks_per_split * BLOCK_M
    for start in range(first, tl.minimum(first + blocks_per_split * BLOCK_M, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q0, q1 = load_pair(q_ptr, rows, q_r * ALIGN, M, HEAD, D0, D1, True)
        g0, g1 = load_pair(g_ptr, rows, g_r * ALIGN, M, HEAD, D0, D1, True)
        lse2 = tl.load(lse_ptr + head * M + rows, mask=rows < M, other=0.0) * 1.4426950408889634
        p_T, dp_T = _probabilities(q0, q1, g0, g1, lse2, k0, k1, v0, v1, keys, N, scale2, D1, N1 == 0)
        total = tl.sum(p_T, 0)
        if N1 > 0:
            more_p_T, more_dp_T = _probabilities(
                q0, q1, g0, g1, lse2, more_k0, more_k1, more_v0, more_v1, more_keys, N, scale2, D1, True
            )
            total += tl.sum(more_p_T, 0)
        # The sum over all keys is 1 except for the rounding of lse. Dividing by it removes that error, which
        # matters for large logits.
        p_T = p_T / total[None, :]
        delta = tl.sum(p_T * dp_T, 0)
        if N1 > 0:
            more_p_T = more_p_T / total[None, :]
            delta += tl.sum(more_p_T * more_dp_T, 0)
        dq0, dq1 = zeros_pair(BLOCK_M, D0, D1)
        dk0, dk1, dv0, dv1, dq0, dq1 = _add_tile(
            dk0, dk1, dv0, dv1, dq0, dq1, p_T, dp_T, delta, q0, q1, g0, g1, k0, k1, D1
        )
        if N1 > 0:
            more_dk0, more_dk1, more_dv0, more_dv1, dq0, dq1 = _add_tile(
                *(more_dk0, more_dk1, more_dv0, more_dv1, dq0, dq1, more_p_T, more_dp_T, delta),
                *(q0, q1, g0, g1, more_k0, more_k1, D1),
            )
        store_pair(dq_ptr, dq0 * scale, dq1 * scale, rows, H * HEAD, M, HEAD, D0, D1)
    # [splits, B, N, H, D]: this part starts at row (split B + b) N.
    out = ((split * (tl.num_programs(1) // H) + b) * N * H + h) * HEAD
    store_pair(dk_parts_ptr + out, dk0 * scale, dk1 * scale, keys, H * HEAD, N, HEAD, D0, D1)
    store_pair(dv_parts_ptr + out, dv0, dv1, keys, H * HEAD, N, HEAD, D0, D1)
    if N1 > 0:
        store_pair(dk_parts_ptr + out, more_dk0 * scale, more_dk1 * scale, more_keys, H * HEAD, N, HEAD, D0, D1)
        store_pair(dv_parts_ptr + out, more_dv0, more_dv1, more_keys, H * HEAD, N, HEAD, D0, D1)


@triton.jit
def attention_short_reduce_kernel(dk_parts_ptr, dv_parts_ptr, dk_ptr, dv_ptr, n, splits, BLOCK: tl.constexpr):
    """Adds the parts [splits, n] of dk and dv, first to last."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    dk = tl.zeros([BLOCK], dtype=tl.float32)
    dv = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(splits):
        dk += tl.load(dk_parts_ptr + split * n + i, mask=inside, other=0.0)
        dv += tl.load(dv_parts_ptr + split * n + i, mask=inside, other=0.0)
    tl.store(dk_ptr + i, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + i, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def split_queries(blocks: int, heads: int, multiprocessors: int) -> tuple[int, int]:
    """(splits, query blocks in each) for about two programs per multiprocessor; no split is empty.

    blocks: blocks of queries of one head. heads: B H.
    """
    splits = max(1, min(blocks, 2 * multiprocessors // heads))
    per_split = cdiv(blocks, splits)
    return cdiv(blocks, per_split), per_split


@cache
def _multiprocessors(device: torch.device) -> int:
    """The number of this GPU; in the interpreter a number that splits even small shapes."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def serves_forward(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether there is a configuration for these shapes and this dtype."""
    return _serves("short_forward", q, k, forward_tiles)


def serves_backward(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether there is a configuration for these shapes and this dtype."""
    return _serves("short_backward", q, k, backward_tiles)


def _serves(kernel: str, q: torch.Tensor, k: torch.Tensor, tiles_of: Callable) -> bool:
    few_and_half = k.shape[2] <= MAX_KEYS and q.dtype != torch.float32
    return few_and_half and config(kernel, tiles_of(q.shape[3], k.shape[2])) is not None


def forward_tiles(head_dim: int, keys: int) -> tuple[int, int, int, int]:
    """(D0, D1, N0, N1)."""
    return *head_tiles(head_dim), *head_tiles(keys)


def backward_tiles(head_dim: int, keys: int) -> tuple[int, int, int, int]:
    """(D0, D1, N0, N1) with only D or only N in two parts, because the sums of four parts do not fit the registers."""
    if head_dim > 64:
        return *head_tiles(head_dim), max(16, next_power_of_2(keys)), 0
    one_key_tile = sum(head_tiles(keys)) > 80
    n0, n1 = (128, 0) if one_key_tile else head_tiles(keys)
    return max(16, next_power_of_2(head_dim)), 0, n0, n1


class Forward:
    """As `attention_general.Forward`, where `serves_forward`."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float):
        (b, h, m, d), n, align = q.shape, k.shape[2], common_alignment(q, k, v)
        tiles = forward_tiles(d, n)
        block_m, warps, stages = _served("short_forward", tiles)
        self._start = Prepared(
            *(attention_short_forward_kernel, (cdiv(m, block_m), b * h), scale),
            *(stride for t in (q, k, v) for stride in scaled_strides(t, align)),
            *(h, m, n, d, align, *tiles, block_m),
            num_warps=warps,
            num_stages=stages,
        )

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(o, lse)."""
        o, lse = rows_first(q), row_numbers(q)
        self._start(q, k, v, o, lse)
        return o, lse


class Backward:
    """As `attention_general.Backward`, where `serves_backward`. It does not read o."""

    def __init__(self, g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float):
        (b, h, m, d), n, align = q.shape, k.shape[2], common_alignment(g, q, k, v)
        tiles = backward_tiles(d, n)
        block_m, warps, stages = _served("short_backward", tiles)
        splits, per_split = split_queries(cdiv(m, block_m), b * h, _multiprocessors(q.device))
        self._parts = splits, k.numel()
        self._start = Prepared(
            *(attention_short_backward_kernel, (splits, b * h), scale),
            *(stride for t in (g, q, k, v) for stride in scaled_strides(t, align)),
            *(h, m, n, per_split, d, align, *tiles, block_m),
            num_warps=warps,
            num_stages=stages,
        )
        programs = cdiv(k.numel(), REDUCE_BLOCK)
        self._reduce = Prepared(attention_short_reduce_kernel, (programs,), k.numel(), splits, BLOCK=REDUCE_BLOCK)

    def __call__(
        self,
        g: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        lse: torch.Tensor,
        lengths: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv)."""
        dq, dk, dv = rows_first(q), rows_first(k), rows_first(v)
        dk_parts, dv_parts = (q.new_empty(self._parts, dtype=torch.float32) for _ in range(2))
        self._start(g, q, k, v, lse, dq, dk_parts, dv_parts)
        self._reduce(dk_parts, dv_parts, dk, dv)
        return dq, dk, dv


def _served(kernel: str, tiles: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """`config` of tiles that are served."""
    found = config(kernel, tiles)
    assert found is not None
    return found


def config(kernel: str, tiles: tuple[int, int, int, int]) -> tuple[int, int, int] | None:
    """(BLOCK_M, warps, stages) of the first row of the table that fits these tiles (D0, D1, N0, N1), or None."""
    d0, d1, n0, n1 = tiles
    return next((row[2:] for row in CONFIGS[kernel] if d0 + d1 <= row[0] and n0 + n1 <= row[1]), None)


def signatures() -> list[dict]:
    """Entries to compile ahead of time (`attention_tiles.signature_entry`): 77 and 128 keys at REPORTED_HEAD_DIMS."""
    kernels = {
        "short_forward": (attention_short_forward_kernel, forward_tiles),
        "short_backward": (attention_short_backward_kernel, backward_tiles),
    }
    found = []
    for (name, (kernel, tiles_of)), d, n in product(kernels.items(), REPORTED_HEAD_DIMS, (77, 128)):
        tiles = tiles_of(d, n)
        if served := config(name, tiles):
            block_m, warps, stages = served
            constexprs = dict(zip(("D0", "D1", "N0", "N1"), tiles, strict=True))
            constexprs |= {"HEAD": d, "ALIGN": 8, "BLOCK_M": block_m}
            found.append(signature_entry(kernel, f"bf16 d{d} n{n} {block_m}", "bf16", constexprs, warps, stages, None))
    label, block = f"bf16 {REDUCE_BLOCK}", {"BLOCK": REDUCE_BLOCK}
    return [*found, signature_entry(attention_short_reduce_kernel, label, "bf16", block, 4, 1, None)]
