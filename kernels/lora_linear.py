"""Frozen linear layers with low-rank adapters. One launch serves up to three that read the same input (q, k, v).

Forward, for each projection p with frozen W_p, b_p and adapter A_p, B_p of scale s_p:

    t_p = x A_p^T        y_p = x W_p^T + b_p + s_p t_p B_p^T

Backward, for gradients g_p of y_p (W and b are frozen):

    u_p = s_p g_p B_p    gx = sum_p g_p W_p + u_p A_p    dA_p = u_p^T x    dB_p = s_p g_p^T t_p

Shapes: x, gx [T, I]; W [O, I]; b [O]; A [R, I]; B [O, R]; y, g [T, O]; t, u [T, sum R], the adapters side by side.
Ranks up to 128 are padded to a power of two of at least 16. Every sum is fp32. t and u are rounded to x's dtype, as in
PyTorch. The adapters are cast in registers. fp32 inputs are multiplied in IEEE fp32. There are no atomics: a sum over T
adds partial sums of fixed blocks in a fixed order.

Work is cut for FEW_PROGRAMS processors: rows of 16 where there are few tokens, chunks of tokens as long as that allows.

FLOPs: forward 2 T (I O + R (I + O)) for each p, backward 2 T (I O + 2 R (I + O)). t has its own kernel. Computing t
again in each block of 128 output columns would cost R / 128 of the whole product (12.5 % at rank 16). Writing it once
costs one more read of x, 2 T I bytes in half precision, and leaves a small x in L2 for the product. Backward reads each
g three times (u, dB, gx) and x once. The partial sums of dA and dB are fp32 [chunks, R (I + O)], written and read once:
67.5 MiB for FLUX's widest layer at rank 128.

It loses if O or I is small (launches) and whenever cuBLAS is faster at the large product. On Hopper we expect that
always, because this product uses no bulk copies; `split_forward` gives it to cuBLAS and makes one more pass
over y. The fused product stays for GPUs where it measures faster. Registers and shared memory alone decided the block
sizes; nothing here has been timed on a GPU.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.launch import Prepared, cdiv
from alignprop_fast.kernels.lora_blocks import FEW_PROGRAMS, MAX_PROJECTIONS, config, rank_block

SUM_BLOCK = 32
# W, b, A, B and s of one projection.
Layer = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, float]
Items = TypeVar("Items", list[Any], tuple[Any, ...])


@triton.jit
def load_tile(base, rows, n_rows, stride, columns, n_columns):
    """base[rows, columns], zero outside."""
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=(rows[:, None] < n_rows) & (columns[None, :] < n_columns), other=0.0)


@triton.jit
def store_tile(base, tile, rows, n_rows, stride, columns, n_columns):
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def pick(p, first, second, third):
    """The value of projection p, an index known only at run time."""
    if p == 1:
        first = second
    elif p == 2:
        first = third
    return first


@triton.jit
def grouped(pid, n_row_blocks, n_column_blocks, GROUP: tl.constexpr):
    """(row block, column block). GROUP row blocks pass over all columns together, so that their x stays in L2."""
    first = pid // (GROUP * n_column_blocks) * GROUP
    rows = tl.minimum(n_row_blocks - first, GROUP)
    within = pid % (GROUP * n_column_blocks)
    return first + within % rows, within // rows


@triton.jit
def add_rows_by_rows(acc, x, x_stride, w, w_stride, rows, n_rows, columns, n_columns, n_inner, BLOCK_K: tl.constexpr):
    """acc + x w^T, with x [n_rows, n_inner] and w [n_columns, n_inner] cast to x's dtype."""
    for start in range(0, n_inner, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left = load_tile(x, rows, n_rows, x_stride, inner, n_inner)
        right = load_tile(w, columns, n_columns, w_stride, inner, n_inner)
        acc = tl.dot(left, tl.trans(right.to(left.dtype)), acc, input_precision="ieee")
    return acc


@triton.jit
def add_rows_by_columns(
    acc, g, g_stride, w, w_stride, rows, n_rows, columns, n_columns, n_inner, BLOCK_K: tl.constexpr
):
    """acc + g w, with g [n_rows, n_inner] and w [n_inner, n_columns] cast to g's dtype."""
    for start in range(0, n_inner, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left = load_tile(g, rows, n_rows, g_stride, inner, n_inner)
        right = load_tile(w, inner, n_inner, w_stride, columns, n_columns)
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def lora_narrow_kernel(
    x_ptr, a0_ptr, a1_ptr, a2_ptr, t_ptr, scale, n_tokens, n_in, x_stride, t_stride, r0, r1, r2, P: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """scale x A^T of up to three adapters A [R, n_in]; TRANSPOSED: of one, given as [n_in, R]."""
    rows, ranks = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
    acc0 = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    acc1, acc2 = acc0, acc0
    for start in range(0, n_in, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, rows, n_tokens, x_stride, inner, n_in)
        if TRANSPOSED:
            a = load_tile(a0_ptr, inner, n_in, r0, ranks, r0)
            acc0 = tl.dot(x, a.to(x.dtype), acc0, input_precision="ieee")
        else:
            a = load_tile(a0_ptr, ranks, r0, n_in, inner, n_in)
            acc0 = tl.dot(x, tl.trans(a.to(x.dtype)), acc0, input_precision="ieee")
        if P > 1:
            a = load_tile(a1_ptr, ranks, r1, n_in, inner, n_in)
            acc1 = tl.dot(x, tl.trans(a.to(x.dtype)), acc1, input_precision="ieee")
        if P > 2:
            a = load_tile(a2_ptr, ranks, r2, n_in, inner, n_in)
            acc2 = tl.dot(x, tl.trans(a.to(x.dtype)), acc2, input_precision="ieee")
    store_tile(t_ptr, scale * acc0, rows, n_tokens, t_stride, ranks, r0)
    if P > 1:
        store_tile(t_ptr + r0, scale * acc1, rows, n_tokens, t_stride, ranks, r1)
    if P > 2:
        store_tile(t_ptr + r0 + r1, scale * acc2, rows, n_tokens, t_stride, ranks, r2)


@triton.jit
def lora_product_kernel(
    x_ptr, t_ptr, w0_ptr, bias0_ptr, b0_ptr, y0_ptr, w1_ptr, bias1_ptr, b1_ptr, y1_ptr,
    w2_ptr, bias2_ptr, b2_ptr, y2_ptr, scale0, scale1, scale2, n_tokens, n_in, x_stride, o0, o1, o2, r0, r1, r2,
    BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    blocks0, blocks1, blocks2 = tl.cdiv(o0, BLOCK_N), tl.cdiv(o1, BLOCK_N), tl.cdiv(o2, BLOCK_N)
    row_block, column_block = grouped(tl.program_id(0), tl.cdiv(n_tokens, BLOCK_T), blocks0 + blocks1 + blocks2, GROUP)
    p = (column_block >= blocks0).to(tl.int32) + (column_block >= blocks0 + blocks1).to(tl.int32)
    w_ptr, y_ptr = pick(p, w0_ptr, w1_ptr, w2_ptr), pick(p, y0_ptr, y1_ptr, y2_ptr)
    b_ptr, bias_ptr = pick(p, b0_ptr, b1_ptr, b2_ptr), pick(p, bias0_ptr, bias1_ptr, bias2_ptr)
    n_out, rank, scale = pick(p, o0, o1, o2), pick(p, r0, r1, r2), pick(p, scale0, scale1, scale2)
    rows = row_block * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = (column_block - pick(p, 0 * o0, blocks0, blocks0 + blocks1)) * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    acc = add_rows_by_rows(acc, x_ptr, x_stride, w_ptr, n_in, rows, n_tokens, columns, n_out, n_in, BLOCK_K)
    t_ptr += pick(p, 0 * r0, r0, r0 + r1)
    for start in range(0, rank, BLOCK_K):
        ranks = start + tl.arange(0, BLOCK_K)
        t = load_tile(t_ptr, rows, n_tokens, r0 + r1 + r2, ranks, rank)
        b = load_tile(b_ptr, columns, n_out, rank, ranks, rank).to(t.dtype)
        acc += scale * tl.dot(t, tl.trans(b), input_precision="ieee")
    if BIAS:
        limit = n_out * (((0 * p + BIAS) >> p) & 1)
        acc += tl.load(bias_ptr + columns, mask=columns < limit, other=0.0).to(tl.float32)[None, :]
    store_tile(y_ptr, acc, rows, n_tokens, n_out, columns, n_out)


@triton.jit
def lora_add_kernel(
    t_ptr, b_ptr, y_ptr, scale, n_tokens, n_out, t_stride, rank,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns, ranks = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    t = load_tile(t_ptr, rows, n_tokens, t_stride, ranks, rank)
    b = load_tile(b_ptr, columns, n_out, rank, ranks, rank).to(t.dtype)
    y = load_tile(y_ptr, rows, n_tokens, n_out, columns, n_out).to(tl.float32)
    y += scale * tl.dot(t, tl.trans(b), input_precision="ieee")
    store_tile(y_ptr, y, rows, n_tokens, n_out, columns, n_out)


def three(items: Items, each: int = 1) -> Items:
    """Padded to those of three projections with the first, whose pointers are then never read. each: of one."""
    return (items * MAX_PROJECTIONS)[: each * MAX_PROJECTIONS]


def three_sizes(sizes: Sequence[int]) -> list[int]:
    return [*sizes, *[0] * (MAX_PROJECTIONS - len(sizes))]


def contiguous(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t.contiguous() for t in tensors]


def rows_contiguous(t: torch.Tensor) -> torch.Tensor:
    """t [..., columns] with contiguous rows, of any number of dimensions if it is contiguous, else of two."""
    if t.is_contiguous():
        return t
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def lora_down(x: torch.Tensor, downs: Sequence[torch.Tensor]) -> torch.Tensor:
    """t = x [A_1; A_2; A_3]^T, [T, sum R] in x's dtype, of x [..., I]."""
    x, downs = rows_contiguous(x), contiguous(downs)
    ranks = tuple([a.shape[0] for a in downs])
    n_in = x.shape[-1]
    n_tokens = x.numel() // n_in
    t = x.new_empty(n_tokens, sum(ranks))
    narrow(x.dtype, n_tokens, n_in, x.stride(-2), t.shape[1], ranks, 1.0)(x, *three(downs), t)
    return t


@cache
def narrow(
    dtype: torch.dtype,
    n_tokens: int,
    n_in: int,
    x_stride: int,
    t_stride: int,
    ranks: tuple[int, ...],
    scale: float,
    transposed: bool = False,
) -> Prepared:
    """Writes scale x A^T of each A [R, I] into t [T, sum R], from (x, three A, t). transposed: of the one A, [I, R]."""
    blocks = narrow_blocks(n_tokens, dtype, rank_block(max(ranks)))
    return Prepared(
        lora_narrow_kernel, (cdiv(n_tokens, blocks["BLOCK_T"]),),
        float(scale), n_tokens, n_in, x_stride, t_stride, *three_sizes(ranks),
        P=len(ranks), TRANSPOSED=transposed, BLOCK_R=rank_block(max(ranks)), **blocks,
    )  # fmt: skip


def narrow_blocks(n_tokens: int, dtype: torch.dtype, block_r: int) -> dict[str, int]:
    """Block sizes, warps and stages of `narrow`, with enough programs if the tokens allow."""
    blocks = config("down", dtype, block_r)
    return blocks if cdiv(n_tokens, blocks["BLOCK_T"]) >= FEW_PROGRAMS else config("few", dtype, block_r)


class Forward:
    """The forward pass of one to three projections in two launches, for an x and layers like these.

    Like these are those of the same dtypes, sizes, strides of x and scales, with a bias where these have one.
    """

    def __init__(self, x: torch.Tensor, layers: Sequence[Layer]):
        *rows, n_in = x.shape
        stride = rows_contiguous(x).stride(-2)
        outs, ranks = [w.shape[0] for w, *_ in layers], tuple([up.shape[1] for _, _, _, up, _ in layers])
        n_tokens, columns = math.prod(rows), sum(ranks)
        blocks = config("product", x.dtype, rank_block(max(ranks)))
        programs = cdiv(n_tokens, blocks["BLOCK_T"]) * sum(cdiv(n, blocks["BLOCK_N"]) for n in outs)
        self._down = narrow(x.dtype, n_tokens, n_in, stride, columns, ranks, 1.0)
        self._product = Prepared(
            lora_product_kernel, (programs,),
            *three([float(scale) for *_, scale in layers]), n_tokens, n_in, stride,
            *three_sizes(outs), *three_sizes(ranks),
            BIAS=sum([1 << p for p, (_, bias, *_) in enumerate(layers) if bias is not None]), **blocks,
        )  # fmt: skip
        self._t_shape, self._y_shapes = (n_tokens, columns), [(*rows, n) for n in outs]

    def __call__(self, x: torch.Tensor, layers: Sequence[Layer]) -> tuple[torch.Tensor, ...]:
        """y [..., O] of each layer in x's dtype, from x [..., I]; the other shapes are in the module docstring.

        Weights and biases have x's dtype, adapters any.
        """
        rows, t = rows_contiguous(x), x.new_empty(*self._t_shape)
        ys: list[torch.Tensor] = []
        downs: list[torch.Tensor] = []
        given: list[torch.Tensor] = []
        for weight, bias, down, up, _ in layers:
            y = x.new_empty(*self._y_shapes[len(ys)])
            ys.append(y)
            downs.append(down.contiguous())
            given += (weight.contiguous(), x if bias is None else bias.contiguous(), up.contiguous(), y)
        self._down(rows, *three(downs), t)
        self._product(rows, t, *three(given, 4))
        return tuple(ys)


@cache
def _add(
    dtype: torch.dtype, n_tokens: int, n_out: int, t_stride: int, rank: int, ranks: tuple[int, ...], scale: float
) -> Prepared:
    """Adds scale t B^T to y, from (t, B, y). rank: of B; ranks: of all."""
    blocks = config("add", dtype, rank_block(max(ranks)))
    grid = (cdiv(n_tokens, blocks["BLOCK_T"]), cdiv(n_out, blocks["BLOCK_N"]))
    sizes = (float(scale), n_tokens, n_out, t_stride, rank)
    return Prepared(lora_add_kernel, grid, *sizes, BLOCK_R=rank_block(rank), **blocks)


def split_forward(x: torch.Tensor, layers: Sequence[Layer]) -> tuple[torch.Tensor, ...]:
    """As `Forward`, but torch computes x W^T + b and a kernel adds s t B^T in place."""
    t, offset = lora_down(x, [down for _, _, down, _, _ in layers]), 0
    ys: list[torch.Tensor] = []
    ranks = tuple([up.shape[1] for _, _, _, up, _ in layers])
    for weight, bias, _, up, scale in layers:
        y, rank = torch.nn.functional.linear(x, weight, bias), up.shape[1]
        _add(x.dtype, t.shape[0], y.shape[-1], t.shape[1], rank, ranks, scale)(
            from_column(t, offset), up.contiguous(), y
        )
        offset += rank
        ys.append(y)
    return tuple(ys)


def from_column(t: torch.Tensor, offset: int) -> torch.Tensor:
    """t[:, offset:], of whose memory a kernel needs only the start."""
    return t[:, offset:] if offset else t


def signatures() -> list[dict]:
    """The forward kernels in each configuration; those of the backward pass are in `lora_linear_backward`."""
    wide = {"P": 3, "TRANSPOSED": False}
    launched = {
        "down": (lora_narrow_kernel, wide),
        "few, few rows": (lora_narrow_kernel, wide),
        "product": (lora_product_kernel, {"BIAS": 7}),
        "add": (lora_add_kernel, {}),
    }
    return signature_entries(launched)


def signature_entries(launched: dict[str, tuple[triton.JITFunction, dict[str, int]]]) -> list[dict]:
    """Entries of these kernels with their flags, in bf16 (fp16 is the same) and fp32, at every padded rank."""
    entries = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for rank in (16, 32, 64, 128):
            for step, (kernel, flags) in launched.items():
                if rank > 16 and "BLOCK_R" not in kernel.arg_names:
                    continue  # the same at every rank
                # A step is a name of `config` and, after a comma, what sets it apart.
                of_table, *variant = step.split(",")
                table = {} if of_table == "sum" else config(of_table, dtype, rank)
                label = ",".join([f"{name} rank {rank}", *variant])
                entries.append(signature_entry(kernel, name, label, {**table, **flags, "BLOCK_R": rank}))
    return entries


def signature_entry(kernel: triton.JITFunction, dtype: str, config: str, given: dict[str, int]) -> dict:
    """One entry; `given` holds the constants, num_warps and num_stages. Adapters have dtype `dtype`."""
    constexprs = {n: v for n, v in given.items() if n in kernel.arg_names}
    types = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            types[name] = "*fp32" if "parts" in name else f"*{dtype}"
        elif name not in constexprs:
            types[name] = "fp32" if name.startswith("scale") else "i32"
    return {
        "kernel": kernel,
        "config": config,
        "signature": types,
        "constexprs": constexprs,
        "num_warps": given.get("num_warps", 4),
        "num_stages": given.get("num_stages", 1),
        "arch": None,
    }
