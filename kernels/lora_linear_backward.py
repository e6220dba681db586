"""Backward kernels of lora_linear; formulas, shapes, cost and block sizes are in `lora_linear`."""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.launch import Prepared, cdiv
from alignprop_fast.kernels.lora_blocks import config, partial_sums, rank_block
from alignprop_fast.kernels.lora_linear import (
    SUM_BLOCK,
    add_rows_by_columns,
    contiguous,
    from_column,
    grouped,
    load_tile,
    lora_narrow_kernel,
    narrow,
    pick,
    rows_contiguous,
    signature_entries,
    store_tile,
    three,
    three_sizes,
)


@triton.jit
def lora_grad_kernel(
    x_ptr, u_ptr, parts_ptr, scale, n_tokens, n_in, x_stride, u_stride, part_size, chunk_size, r0, r1, r2,
    P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One pass over x: the part of scale u^T x from this chunk of tokens, with the adapters stacked."""
    chunk = tl.program_id(0)
    columns, ranks = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    acc0 = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    acc1, acc2 = acc0, acc0
    for start in range(0, chunk_size, BLOCK_T):
        rows = chunk * chunk_size + start + tl.arange(0, BLOCK_T)
        x = load_tile(x_ptr, rows, n_tokens, x_stride, columns, n_in)
        u = load_tile(u_ptr, rows, n_tokens, u_stride, ranks, r0)
        acc0 = tl.dot(tl.trans(u), x, acc0, input_precision="ieee")
        if P > 1:
            u = load_tile(u_ptr + r0, rows, n_tokens, u_stride, ranks, r1)
            acc1 = tl.dot(tl.trans(u), x, acc1, input_precision="ieee")
        if P > 2:
            u = load_tile(u_ptr + r0 + r1, rows, n_tokens, u_stride, ranks, r2)
            acc2 = tl.dot(tl.trans(u), x, acc2, input_precision="ieee")
    parts_ptr += chunk.to(tl.int64) * part_size
    store_tile(parts_ptr, scale * acc0, ranks, r0, n_in, columns, n_in)
    if P > 1:
        store_tile(parts_ptr + r0 * n_in, scale * acc1, ranks, r1, n_in, columns, n_in)
    if P > 2:
        store_tile(parts_ptr + (r0 + r1) * n_in, scale * acc2, ranks, r2, n_in, columns, n_in)


@triton.jit
def lora_sum_kernel(parts_ptr, out_ptr, n, n_parts, BLOCK: tl.constexpr):
    """The sum of n_parts vectors of n numbers, first to last."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(n_parts):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * n + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def lora_input_grad_kernel(
    g0_ptr, g1_ptr, g2_ptr, u_ptr, w0_ptr, w1_ptr, w2_ptr, a0_ptr, a1_ptr, a2_ptr, gx_ptr,
    n_tokens, n_in, s0, s1, s2, o0, o1, o2, r0, r1, r2, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_block, column_block = grouped(tl.program_id(0), tl.cdiv(n_tokens, BLOCK_T), tl.cdiv(n_in, BLOCK_N), GROUP)
    rows, columns = row_block * BLOCK_T + tl.arange(0, BLOCK_T), column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    stride = r0 + r1 + r2
    acc = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    # One loop for all projections keeps the compiled code small.
    for p in range(P):
        g, w = pick(p, g0_ptr, g1_ptr, g2_ptr), pick(p, w0_ptr, w1_ptr, w2_ptr)
        g_stride, n_out, rank = pick(p, s0, s1, s2), pick(p, o0, o1, o2), pick(p, r0, r1, r2)
        acc = add_rows_by_columns(acc, g, g_stride, w, n_in, rows, n_tokens, columns, n_in, n_out, BLOCK_K)
        u = u_ptr + pick(p, 0 * r0, r0, r0 + r1)
        a = pick(p, a0_ptr, a1_ptr, a2_ptr)
        acc = add_rows_by_columns(acc, u, stride, a, n_in, rows, n_tokens, columns, n_in, rank, BLOCK_K)
    store_tile(gx_ptr, acc, rows, n_tokens, n_in, columns, n_in)


def up_products(
    gs: Sequence[torch.Tensor], ups: Sequence[torch.Tensor], scales: tuple[float, ...], like: torch.Tensor
) -> torch.Tensor:
    """u [T, sum R], with the memory and dtype of t."""
    u, offset = torch.empty_like(like), 0
    n_tokens, columns = u.shape
    for g, up, scale in zip(gs, ups, scales, strict=True):
        n_out, rank = up.shape
        narrow(g.dtype, n_tokens, n_out, g.stride(-2), columns, (rank,), scale, transposed=True)(
            g, *three([up]), from_column(u, offset)
        )
        offset += rank
    return u


class _Sums:
    """Launches that take the sums over T for dA and dB of one to three adapters, on inputs of certain sizes.

    Partial sums of all adapters lie side by side in one tensor [chunks, sum of sizes], so that one launch adds them.

    Attributes:
        sizes: numbers of all dA together, then of each dB.
        down: the partial sums of dA, from (x, u, parts).
        ups: those of each dB, from (g, t from the adapter's first column, parts from the dB's first column).
    """

    def __init__(
        self,
        dtype: torch.dtype,
        n_tokens: int,
        n_in: int,
        x_stride: int,
        g_strides: tuple[int, ...],
        outs: tuple[int, ...],
        ranks: tuple[int, ...],
        scales: tuple[float, ...],
    ):
        block_r, columns = rank_block(max(ranks)), sum(ranks)
        blocks = config("grad", dtype, block_r)
        chunk, self.chunks, self.sizes = partial_sums(n_tokens, n_in, outs, ranks, dtype)

        def prepared(scale: float, width: int, stride: int, ranks: tuple[int, ...]) -> Prepared:
            return Prepared(
                lora_grad_kernel, (self.chunks, cdiv(width, blocks["BLOCK_N"])),
                float(scale), n_tokens, width, stride, columns, sum(self.sizes), chunk,
                *three_sizes(ranks), P=len(ranks), BLOCK_R=block_r, **blocks,
            )  # fmt: skip

        self.down = prepared(1.0, n_in, x_stride, ranks)
        self.ups = [
            prepared(scale, out, stride, (rank,))
            for scale, out, stride, rank in zip(scales, outs, g_strides, ranks, strict=True)
        ]


_sums = cache(_Sums)


def adapter_grads(
    x: torch.Tensor,
    u: torch.Tensor,
    gs: Sequence[torch.Tensor],
    t: torch.Tensor,
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([dA_p [R_p, I]], [dB_p [O_p, R_p]]), views of one tensor in fp32."""
    n_in, outs, strides = x.shape[-1], tuple([g.shape[-1] for g in gs]), tuple([g.stride(-2) for g in gs])
    sums = _sums(x.dtype, t.shape[0], n_in, x.stride(-2), strides, outs, ranks, scales)
    parts = x.new_empty(sums.chunks, sum(sums.sizes), dtype=torch.float32)
    sums.down(x, u, parts)
    column, start = 0, sums.sizes[0]
    for g, up, rank, size in zip(gs, sums.ups, ranks, sums.sizes[1:], strict=True):
        up(g, from_column(t, column), from_column(parts, start))
        column, start = column + rank, start + size
    d_downs, *d_ups = add_parts(parts).split(sums.sizes)
    d_downs = d_downs.view(-1, n_in)
    pairs = zip(d_ups, ranks, strict=True)
    return list(d_downs.split(ranks)) if len(ranks) > 1 else [d_downs], [d_up.view(rank, -1).T for d_up, rank in pairs]


@cache
def _add_parts(n_parts: int, n: int) -> Prepared:
    return Prepared(lora_sum_kernel, (cdiv(n, SUM_BLOCK),), n, n_parts, BLOCK=SUM_BLOCK, num_warps=1)


def add_parts(parts: torch.Tensor) -> torch.Tensor:
    """Sum of fp32 parts [chunks, n] over the chunks in a fixed order, in fp32."""
    out = parts.new_empty(parts.shape[1])
    _add_parts(*parts.shape)(parts, out)
    return out


@cache
def _input_grad(
    dtype: torch.dtype,
    n_tokens: int,
    n_in: int,
    g_strides: tuple[int, ...],
    outs: tuple[int, ...],
    ranks: tuple[int, ...],
) -> Prepared:
    """Writes gx, from (three g, u, three W, three A, gx)."""
    blocks = config("product", dtype, rank_block(max(ranks)))
    programs = cdiv(n_tokens, blocks["BLOCK_T"]) * cdiv(n_in, blocks["BLOCK_N"])
    return Prepared(
        lora_input_grad_kernel, (programs,), n_tokens, n_in, *three(g_strides), *three_sizes(outs), *three_sizes(ranks),
        P=len(outs), **blocks,
    )  # fmt: skip


def input_grad(
    gs: Sequence[torch.Tensor], u: torch.Tensor, weights: Sequence[torch.Tensor], downs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """gx [..., I]."""
    n_in, strides = weights[0].shape[1], tuple([g.stride(-2) for g in gs])
    outs, ranks = tuple([w.shape[0] for w in weights]), tuple([a.shape[0] for a in downs])
    gx = u.new_empty(*gs[0].shape[:-1], n_in)
    _input_grad(u.dtype, u.shape[0], n_in, strides, outs, ranks)(*three(gs), u, *three(weights), *three(downs), gx)
    return gx


def lora_linear_backward(
    gs: Sequence[torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    weights: Sequence[torch.Tensor],
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    scales: tuple[float, ...],
    wants_gx: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of one to three projections of x [..., I] from gs [..., O_p]; t is the forward pass's.

    Returns (gx in x's dtype with its number of elements, or None; [dA_p], [dB_p] in fp32); adapters are of one dtype.
    """
    gs, x, t = [rows_contiguous(g) for g in gs], rows_contiguous(x), t.contiguous()
    ups = contiguous(ups)
    u = up_products(gs, ups, scales, t)
    gx = input_grad(gs, u, contiguous(weights), contiguous(downs)) if wants_gx else None
    return gx, *adapter_grads(x, u, gs, t, tuple([up.shape[1] for up in ups]), scales)


def signatures() -> list[dict]:
    """The backward kernels in each configuration."""
    one = {"P": 1, "TRANSPOSED": True}
    return signature_entries(
        {
            "down, transposed": (lora_narrow_kernel, one),
            "few, transposed, few rows": (lora_narrow_kernel, one),
            "grad": (lora_grad_kernel, {"P": 3}),
            "product": (lora_input_grad_kernel, {"P": 3}),
            "sum": (lora_sum_kernel, {"BLOCK": SUM_BLOCK, "num_warps": 1}),
        }
    )
