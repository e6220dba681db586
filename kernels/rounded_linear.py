"""The two passes around a product of 8-bit numbers: rows rounded to 8 bits, and int32 sums scaled to the result.

    rows:   s = max_i |x_i| / L,  q = round(x / s)        L = 127 (int8, to nearest even) or 448 (fp8, e4m3)
    sums:   y = s_x s_w (q_x q_w^T) + b

Shapes: x, q [T, C]; s, s_x [T]; sums, y [T, O]; s_w, b [O]; all contiguous, scales in fp32, computed in fp32. Bytes
moved with x and y in bf16: 3 T C and 6 T O. An element takes about 4 FLOP, so memory is the bound. Registers hold a
whole row of x, padded to a power of two. Both passes lose where the product gains less than they take: small C or O.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.launch import Prepared, cdiv, next_power_of_2

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# (largest padded width, rows per program, warps); a thread takes 16 to 32 elements.
CONFIGS = [(256, 8, 4), (512, 4, 4), (1024, 2, 4), (2048, 1, 4), (4096, 1, 8), (16384, 1, 16)]
MAX_WIDTH = CONFIGS[-1][0]
BLOCK, WARPS = 1024, 4  # of the sums' columns


@triton.jit
def round_rows_kernel(
    x_ptr, q_ptr, scale_ptr, rows, C, LARGEST: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_C)
    at = row[:, None] * C + col[None, :]
    inside = (row[:, None] < rows) & (col[None, :] < C)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=1) / LARGEST, 1.1754943508222875e-38)
    q = x / scale[:, None]
    if LARGEST == 127.0:
        # 1.5 * 2^23: the sum has no bits below one, so the addition rounds to nearest even.
        q = (q + 12582912.0) - 12582912.0
    tl.store(q_ptr + at, q.to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@triton.jit
def scale_sums_kernel(
    sums_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, width, blocks, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    sums = tl.load(sums_ptr + row * width + col, mask=inside).to(tl.float32)
    y = sums * tl.load(x_scale_ptr + row) * tl.load(w_scale_ptr + col, mask=inside)
    if BIAS:
        y += tl.load(bias_ptr + col, mask=inside).to(tl.float32)
    tl.store(y_ptr + row * width + col, y.to(y_ptr.dtype.element_ty), mask=inside)


def config(width: int) -> tuple[int, int, int]:
    """(BLOCK_C, ROWS, warps) for rows of this many channels. Raises ValueError above MAX_WIDTH."""
    for block, rows, warps in CONFIGS:
        if width <= block:
            return next_power_of_2(width), rows, warps
    raise ValueError(f"round_rows holds a row in registers: at most {MAX_WIDTH} channels, not {width}")


@cache
def _rows(rows: int, width: int, dtype: torch.dtype) -> Prepared:
    """Takes x, q and the scale."""
    block, rows_each, warps = config(width)
    sizes = {"LARGEST": LARGEST[dtype], "ROWS": rows_each, "BLOCK_C": block, "num_warps": warps}
    return Prepared(round_rows_kernel, (cdiv(rows, rows_each),), rows, width, **sizes)


@cache
def _sums(rows: int, width: int, bias: bool) -> Prepared:
    """Takes the sums, both scales, the bias and y."""
    blocks = cdiv(width, BLOCK)
    return Prepared(scale_sums_kernel, (rows * blocks,), width, blocks, BIAS=bias, BLOCK=BLOCK, num_warps=WARPS)


def round_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on x [T, C]: (q [T, C] in `dtype`, one of `LARGEST`; s [T, 1] in fp32)."""
    x = x.contiguous()
    rows, width = x.shape
    q = torch.empty_like(x, dtype=dtype)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    _rows(rows, width, dtype)(x, q, scale)
    return q, scale


def scale_sums(
    sums: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Launch on int32 sums [T, O], scales [T, 1] and [O, 1] in fp32, and bias [O] or None: y [T, O] in `dtype`."""
    rows, width = sums.shape
    y = torch.empty_like(sums, dtype=dtype)
    start = _sums(rows, width, bias is not None)
    start(sums, x_scale, w_scale, sums if bias is None else bias.contiguous(), y)
    return y


def signatures() -> list[dict]:
    """Every shipped configuration in bf16, fp8 for GPUs from compute capability 8.9 on."""
    entries = []
    for dtype, short, arch in ((torch.int8, "i8", None), (torch.float8_e4m3fn, "fp8e4nv", (89, 90, 100, 120))):
        for block, rows, warps in CONFIGS:
            signature = {"x_ptr": "*bf16", "q_ptr": f"*{short}", "scale_ptr": "*fp32", "rows": "i32", "C": "i32"}
            sizes = {"LARGEST": LARGEST[dtype], "ROWS": rows, "BLOCK_C": block}
            entries.append(_entry(round_rows_kernel, f"{short} {rows}x{block}", signature, sizes, warps, arch))
    types = {"sums_ptr": "*i32", "bias_ptr": "*bf16", "y_ptr": "*bf16", "width": "i32", "blocks": "i32"}
    names = [name for name in scale_sums_kernel.arg_names if name not in ("BIAS", "BLOCK")]
    signature = {name: types.get(name, "*fp32") for name in names}
    entries.append(_entry(scale_sums_kernel, f"bf16 {BLOCK}", signature, {"BIAS": True, "BLOCK": BLOCK}, WARPS, None))
    return entries


def _entry(
    kernel: triton.JITFunction, name: str, signature: dict, sizes: dict, warps: int, arch: tuple[int, ...] | None
) -> dict:
    return {
        "kernel": kernel,
        "config": f"{name} w{warps}",
        "signature": signature,
        "constexprs": sizes,
        "num_warps": warps,
        "num_stages": 1,
        "arch": arch,
    }
