"""Backward kernels of lora_linear; formulas, shapes, cost and block sizes are in `lora_linear`."""

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.launch import cdiv, launch
from alignprop_fast.kernels.lora_blocks import config, partial_sums, rank_block
from alignprop_fast.kernels.lora_linear import (
    SUM_BLOCK,
    add_rows_by_columns,
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
    gs: list[torch.Tensor], ups: list[torch.Tensor], scales: list[float], like: torch.Tensor
) -> torch.Tensor:
    """u [T, sum R], with the memory and dtype of t."""
    u, offset = torch.empty_like(like), 0
    for g, up, scale in zip(gs, ups, scales, strict=True):
        narrow(g, [up], [up.shape[1]], u[:, offset:], scale, transposed=True)
        offset += up.shape[1]
    return u


def adapter_grads(
    x: torch.Tensor,
    u: torch.Tensor,
    gs: list[torch.Tensor],
    t: torch.Tensor,
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    scales: list[float],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([dA_p [R_p, I]], [dB_p [O_p, R_p]]), views of one tensor in fp32.

    Partial sums of all adapters lie side by side, so that one launch adds them.
    """
    ranks, outs = [a.shape[0] for a in downs], [g.shape[1] for g in gs]
    block_r = rank_block(max(ranks))
    blocks = config("grad", x.dtype, block_r)
    chunk, chunks, sizes = partial_sums(*x.shape, outs, ranks, x.dtype)
    parts = torch.empty(chunks, sum(sizes), dtype=torch.float32, device=x.device)

    def sum_by_chunks(x: torch.Tensor, u: torch.Tensor, ranks: list[int], start: int, scale: float) -> None:
        launch(
            lora_grad_kernel, (chunks, cdiv(x.shape[1], blocks["BLOCK_N"])),
            x, u, parts[:, start:], float(scale), *x.shape, x.stride(0), u.stride(0), parts.shape[1], chunk,
            *three_sizes(ranks), P=len(ranks), BLOCK_R=block_r, **blocks,
        )  # fmt: skip

    sum_by_chunks(x, u, ranks, 0, 1.0)
    for p, (g, rank, scale) in enumerate(zip(gs, ranks, scales, strict=True)):
        sum_by_chunks(g, t[:, sum(ranks[:p]) :], [rank], sum(sizes[: p + 1]), scale)
    d_downs, *d_ups = add_parts(parts).split(sizes)
    pairs = zip(d_ups, ranks, strict=True)
    return list(d_downs.view(-1, x.shape[1]).split(ranks)), [d_up.view(rank, -1).T for d_up, rank in pairs]


def add_parts(parts: torch.Tensor) -> torch.Tensor:
    """Sum of fp32 parts [chunks, n] over the chunks in a fixed order, in fp32."""
    n_parts, n = parts.shape
    out = parts.new_empty(n)
    launch(lora_sum_kernel, (cdiv(n, SUM_BLOCK),), parts, out, n, n_parts, BLOCK=SUM_BLOCK, num_warps=1)
    return out


def input_grad(
    gs: list[torch.Tensor], u: torch.Tensor, weights: list[torch.Tensor], downs: list[torch.Tensor]
) -> torch.Tensor:
    """gx [T, I]."""
    n_tokens, n_in = u.shape[0], weights[0].shape[1]
    gx = torch.empty(n_tokens, n_in, dtype=u.dtype, device=u.device)
    ranks = [a.shape[0] for a in downs]
    blocks = config("product", u.dtype, rank_block(max(ranks)))
    programs = cdiv(n_tokens, blocks["BLOCK_T"]) * cdiv(n_in, blocks["BLOCK_N"])
    launch(
        lora_input_grad_kernel, (programs,),
        *three(gs), u, *three(weights), *three(downs), gx, n_tokens, n_in, *three([g.stride(0) for g in gs]),
        *three_sizes([w.shape[0] for w in weights]), *three_sizes(ranks), P=len(gs), **blocks,
    )  # fmt: skip
    return gx


def lora_linear_backward(
    gs: list[torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    weights: list[torch.Tensor],
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    scales: list[float],
    wants_gx: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of one to three projections of x [T, I] from gs [T, O_p]; t is the forward pass's.

    Returns (gx [T, I] in x's dtype or None, [dA_p], [dB_p] in fp32); all adapters are of one dtype.
    """
    gs, x, t = [rows_contiguous(g) for g in gs], rows_contiguous(x), t.contiguous()
    weights, downs, ups = ([m.contiguous() for m in group] for group in (weights, downs, ups))
    u = up_products(gs, ups, scales, t)
    gx = input_grad(gs, u, weights, downs) if wants_gx else None
    return gx, *adapter_grads(x, u, gs, t, downs, ups, scales)


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
