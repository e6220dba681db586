"""Backward kernels of lora_linear; formulas, shapes, cost and block sizes are in `lora_linear`."""

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.launch import launch
from alignprop_fast.kernels.lora_linear import (
    SUM_BLOCK,
    add_rows_by_columns,
    config,
    grouped,
    load_tile,
    pick,
    rank_block,
    rows_contiguous,
    signature_entries,
    store_tile,
    three,
    three_sizes,
)


@triton.jit
def lora_up_grad_kernel(
    g_ptr, b_ptr, t_ptr, u_ptr, parts_ptr, scale, n_tokens, n_out, g_stride, t_stride, rank,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One pass over g: u = s g B, and the part of dB = s g^T t from this block of rows."""
    block = tl.program_id(0)
    rows, ranks = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
    t = load_tile(t_ptr, rows, n_tokens, t_stride, ranks, rank)
    parts_ptr += block.to(tl.int64) * n_out * rank
    u = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for start in range(0, n_out, BLOCK_K):
        outs = start + tl.arange(0, BLOCK_K)
        g = load_tile(g_ptr, rows, n_tokens, g_stride, outs, n_out)
        b = load_tile(b_ptr, outs, n_out, rank, ranks, rank)
        u = tl.dot(g, b.to(g.dtype), u, input_precision="ieee")
        part = scale * tl.dot(tl.trans(g), t, input_precision="ieee")
        store_tile(parts_ptr, part, outs, n_out, rank, ranks, rank)
    store_tile(u_ptr, scale * u, rows, n_tokens, t_stride, ranks, rank)


@triton.jit
def lora_down_grad_kernel(
    x_ptr, u_ptr, parts_ptr, n_tokens, n_in, x_stride, r0, r1, r2, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One pass over x: the part of dA = u^T x from this chunk of tokens, with the adapters stacked."""
    chunk = tl.program_id(0)
    columns, ranks = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    stride = r0 + r1 + r2
    acc0 = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    acc1, acc2 = acc0, acc0
    for start in range(0, CHUNK, BLOCK_T):
        rows = chunk * CHUNK + start + tl.arange(0, BLOCK_T)
        x = load_tile(x_ptr, rows, n_tokens, x_stride, columns, n_in)
        u = load_tile(u_ptr, rows, n_tokens, stride, ranks, r0)
        acc0 = tl.dot(tl.trans(u), x, acc0, input_precision="ieee")
        if P > 1:
            u = load_tile(u_ptr + r0, rows, n_tokens, stride, ranks, r1)
            acc1 = tl.dot(tl.trans(u), x, acc1, input_precision="ieee")
        if P > 2:
            u = load_tile(u_ptr + r0 + r1, rows, n_tokens, stride, ranks, r2)
            acc2 = tl.dot(tl.trans(u), x, acc2, input_precision="ieee")
    parts_ptr += chunk.to(tl.int64) * stride * n_in
    store_tile(parts_ptr, acc0, ranks, r0, n_in, columns, n_in)
    if P > 1:
        store_tile(parts_ptr + r0 * n_in, acc1, ranks, r1, n_in, columns, n_in)
    if P > 2:
        store_tile(parts_ptr + (r0 + r1) * n_in, acc2, ranks, r2, n_in, columns, n_in)


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


def add_parts(parts: torch.Tensor) -> torch.Tensor:
    """Sum of fp32 parts [n, rows, columns] over n in a fixed order, in fp32."""
    out = parts.new_empty(parts.shape[1:])
    n = out.numel()
    launch(lora_sum_kernel, (triton.cdiv(n, SUM_BLOCK),), parts, out, n, parts.shape[0], BLOCK=SUM_BLOCK)
    return out


def up_grads(
    gs: list[torch.Tensor], t: torch.Tensor, ups: list[torch.Tensor], scales: list[float]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(u [T, sum R], [dB_p [O_p, R_p]])."""
    u, grads, offset = torch.empty_like(t), [], 0
    blocks = config("up_grad", t.dtype, rank_block(ups, 1))
    programs = triton.cdiv(t.shape[0], blocks["BLOCK_T"])
    for g, up, scale in zip(gs, ups, scales, strict=True):
        parts = torch.empty(programs, *up.shape, dtype=torch.float32, device=t.device)
        launch(
            lora_up_grad_kernel, (programs,),
            g, up, t[:, offset:], u[:, offset:], parts, float(scale), *g.shape, g.stride(0), t.stride(0), up.shape[1],
            BLOCK_R=rank_block([up], 1), **blocks,
        )  # fmt: skip
        grads.append(add_parts(parts))
        offset += up.shape[1]
    return u, grads


def down_grads(x: torch.Tensor, u: torch.Tensor, downs: list[torch.Tensor]) -> list[torch.Tensor]:
    """[dA_p [R_p, I]]."""
    block_r, ranks = rank_block(downs, 0), [a.shape[0] for a in downs]
    blocks = config("down_grad", x.dtype, block_r)
    chunks = triton.cdiv(x.shape[0], blocks["CHUNK"])
    parts = torch.empty(chunks, sum(ranks), x.shape[1], dtype=torch.float32, device=x.device)
    launch(
        lora_down_grad_kernel, (chunks, triton.cdiv(x.shape[1], blocks["BLOCK_N"])),
        x, u, parts, *x.shape, x.stride(0), *three_sizes(ranks), P=len(downs), BLOCK_R=block_r, **blocks,
    )  # fmt: skip
    return list(add_parts(parts).split(ranks))


def input_grad(
    gs: list[torch.Tensor], u: torch.Tensor, weights: list[torch.Tensor], downs: list[torch.Tensor]
) -> torch.Tensor:
    """gx [T, I]."""
    n_tokens, n_in = u.shape[0], weights[0].shape[1]
    gx = torch.empty(n_tokens, n_in, dtype=u.dtype, device=u.device)
    blocks = config("product", u.dtype, rank_block(downs, 0))
    programs = triton.cdiv(n_tokens, blocks["BLOCK_T"]) * triton.cdiv(n_in, blocks["BLOCK_N"])
    launch(
        lora_input_grad_kernel, (programs,),
        *three(gs), u, *three(weights), *three(downs), gx, n_tokens, n_in, *three([g.stride(0) for g in gs]),
        *three_sizes([w.shape[0] for w in weights]), *three_sizes([a.shape[0] for a in downs]), P=len(gs), **blocks,
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
    u, d_ups = up_grads(gs, t, ups, scales)
    gx = input_grad(gs, u, weights, downs) if wants_gx else None
    return gx, down_grads(x, u, downs), d_ups


def signatures() -> list[dict]:
    """The backward kernels in each configuration."""
    return signature_entries(
        {
            "up_grad": (lora_up_grad_kernel, {}),
            "down_grad": (lora_down_grad_kernel, {"P": 3}),
            "input_grad": (lora_input_grad_kernel, {"P": 3}),
            "sum": (lora_sum_kernel, {"BLOCK": SUM_BLOCK}),
        }
    )
