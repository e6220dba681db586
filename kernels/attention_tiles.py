"""Tiles of rows by head dimension, shared by the attention kernels.

A head dimension is the sum of two powers of two, D = D0 + D1 (40 = 32 + 16 with 8 columns of padding, 80 = 64 + 16,
160 = 128 + 32). A single power of two would multiply up to 60 % more columns, all zeros (160 in 256), and would not fit
the registers. Therefore every tile is a pair. If one power of two is enough, D1 is 0 and the second half is unused.
Products run on tensor cores for half types and as IEEE fp32 multiply-adds for fp32 inputs. Both are summed in fp32.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.launch import next_power_of_2

MAX_HEAD_DIM = 160
# Head dimensions of SD1.5 (40, 80, 160), SDXL (64) and FLUX (128). fp16 takes as many registers as bf16.
REPORTED_HEAD_DIMS = (40, 64, 80, 128, 160)
# Table of configurations -> the dtype to report it in, the architectures that use it (None: all).
REPORTED_TYPES = {"half": ("bf16", [80, 86, 89, 100, 120]), "half sm_90": ("bf16", [90]), "fp32": ("fp32", None)}


def head_tiles(head_dim: int) -> tuple[int, int]:
    """(D0, D1): powers of two of at least 16, or D1 = 0, whose sum is the padded head dimension."""
    d0 = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(0, head_dim - d0)
    # Beside D0 = 128, a second tile of 16 columns takes more registers than one of 32.
    d1 = max(32 if d0 == 128 else 16, next_power_of_2(rest)) if rest else 0
    return (2 * d0, 0) if d1 == d0 else (d0, d1)


def common_alignment(*tensors: torch.Tensor) -> int:
    """Largest power of two up to 16 that divides every stride but the last of these [B, H, rows, D] tensors.

    The kernels take strides divided by it and multiply them again, so that the compiler knows the alignment of each
    row. Its own test is divisibility by 16, and would load a head of 40 elements one by one.
    """
    # The stride of a dimension of size 1 is never used and can have any value.
    used = (stride for t in tensors for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True) if size > 1)
    return math.gcd(16, *used)


def scaled_strides(t: torch.Tensor, align: int) -> tuple[int, int, int]:
    """Strides of batch, head and row in units of `align` elements."""
    b, h, rows, _ = t.stride()
    return b // align, h // align, rows // align


def rows_first(t_BHMD: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor of the same shape and dtype, [B, H, M, D] over contiguous [B, M, H, D] memory."""
    b, h, m, d = t_BHMD.shape
    return t_BHMD.new_empty_strided((b, h, m, d), (m * h * d, d, h * d, 1))


def row_numbers(t_BHMD: torch.Tensor) -> torch.Tensor:
    """An uninitialised [B, H, M] in fp32."""
    b, h, m, _ = t_BHMD.shape
    return t_BHMD.new_empty_strided((b, h, m), (h * m, m, 1), dtype=torch.float32)


@cache
def capability(device: torch.device) -> int:
    """Compute capability as one number (89), or 0 without a GPU (the interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@triton.jit
def load_tile(
    base, rows, row_stride, n_rows, START: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, MASK: tl.constexpr
):
    """Columns START to START + WIDTH of `rows`; zero beyond column HEAD and, if MASK, beyond row n_rows."""
    columns = START + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * row_stride + columns[None, :]
    if START + WIDTH > HEAD:
        inside = columns[None, :] < HEAD
        if MASK:
            inside = inside & (rows[:, None] < n_rows)
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif MASK:
        tile = tl.load(pointers, mask=rows[:, None] < n_rows, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_pair(
    base, rows, row_stride, n_rows, HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASK: tl.constexpr
):
    first = load_tile(base, rows, row_stride, n_rows, 0, D0, HEAD, MASK)
    second = first
    if D1 > 0:
        second = load_tile(base, rows, row_stride, n_rows, D0, D1, HEAD, MASK)
    return first, second


@triton.jit
def store_tile(base, tile, rows, row_stride, n_rows, START: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    columns = START + tl.arange(0, WIDTH)
    inside = (rows[:, None] < n_rows) & (columns[None, :] < HEAD)
    pointers = base + rows[:, None] * row_stride + columns[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store_pair(base, first, second, rows, row_stride, n_rows, HEAD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    store_tile(base, first, rows, row_stride, n_rows, 0, D0, HEAD)
    if D1 > 0:
        store_tile(base, second, rows, row_stride, n_rows, D0, D1, HEAD)


@triton.jit
def zeros_pair(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    first = tl.zeros([ROWS, D0], dtype=tl.float32)
    second = first
    if D1 > 0:
        second = tl.zeros([ROWS, D1], dtype=tl.float32)
    return first, second


@triton.jit
def rows_by_rows(a0, a1, b0, b1, D1: tl.constexpr):
    """a b^T: [rows of a, rows of b], summed over the head dimension."""
    product = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1 > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision="ieee")
    return product


@triton.jit
def add_product(acc0, acc1, weights, b0, b1, D1: tl.constexpr):
    """acc + weights b, with weights [rows of acc, rows of b] rounded to b's dtype."""
    weights = weights.to(b0.dtype)
    acc0 = tl.dot(weights, b0, acc0, input_precision="ieee")
    if D1 > 0:
        acc1 = tl.dot(weights, b1, acc1, input_precision="ieee")
    return acc0, acc1


@triton.jit
def row_dots(a0, a1, b0, b1, D1: tl.constexpr):
    """The inner product of each row of a with the same row of b, in fp32."""
    total = tl.sum(a0.to(tl.float32) * b0.to(tl.float32), 1)
    if D1 > 0:
        total += tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)
    return total


def signature_entry(
    kernel: triton.JITFunction,
    config: str,
    dtype: str,
    constexprs: dict[str, int],
    warps: int,
    stages: int,
    archs: list[int] | None,
) -> dict:
    """One entry of a kernel module's `signatures()`: everything needed to compile `kernel` ahead of time.

    Pointers have type `dtype` ("bf16"), statistics and partial sums fp32, lengths int32. Other arguments are 32-bit
    integers, except `scale`, which is fp32.
    """
    types = {}
    for name in kernel.arg_names:
        if name == "lengths_ptr":
            types[name] = "*i32"
        elif name.endswith("_ptr"):
            types[name] = "*fp32" if name.startswith(("lse", "delta")) or "parts" in name else f"*{dtype}"
        elif name not in constexprs:
            types[name] = "fp32" if name == "scale" else "i32"
    return {
        "kernel": kernel,
        "config": f"{config} w{warps} s{stages}",
        "signature": types,
        "constexprs": constexprs,
        "num_warps": warps,
        "num_stages": stages,
        "arch": archs,
    }
