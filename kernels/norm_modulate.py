"""Layer norm or RMS norm with frozen weights and adaLN's modulation, with the addition of a gated branch before it.

Forward, over the C channels of each token (Ba et al. 2016, eq. 4; Zhang & Sennrich 2019; Peebles & Xie 2023):

    s = x + gate * branch        y = xhat * weight * (one + scale) + shift
    xhat = (s - mean(s)) * rstd, rstd = (var(s) + eps)^-1/2;  RMS: the same with a mean of zero

Backward, for the gradients g of y and h of s; weights learn nothing here, nor do modulations:

    c = g * weight * (one + scale)
    dx = rstd * (c - mean(c) - xhat * mean(c * xhat)) + h        dbranch = gate * dx;  RMS: without mean(c)

Shapes: x, branch, s, y, g, h, dx, dbranch [T, C]; weight [C]. gate, scale and shift have a row of C for each token, for
each batch element or for all: [T / k, C], where k tokens in a row share one. All sums are fp32. Mean and rstd are taken
of s after rounding to its storage dtype, and computed again in the backward pass, which holds the row anyway: it gets
the same numbers, and the host allocates and saves none. Elements moved, with n = T C: forward 2 n (4 n with a branch),
backward 3 n (5 n with h and a gate). Each element takes about 12 FLOP, so memory is the bound. Registers hold a whole
row, padded to a power of two. If C is just above a power of two (640, 1280), lanes idle; that costs issue slots, not
bytes. It loses on few short rows, which do not fill the chip.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.launch import Prepared, cdiv, next_power_of_2

# (largest padded width, tokens per program, warps); a thread takes 16 to 32 elements.
CONFIGS = [(256, 8, 4), (512, 4, 4), (1024, 2, 4), (2048, 1, 4), (4096, 1, 8), (8192, 1, 16)]
MAX_WIDTH = CONFIGS[-1][0]


@triton.jit
def _shared(ptr, row, tokens, stride, col, inside):
    """Rows of a tensor of which `tokens` tokens in a row share one, in fp32."""
    at = (row // tokens).to(tl.int64) * stride
    return tl.load(ptr + at[:, None] + col[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _normed(s, inside, C, eps, RMS: tl.constexpr):
    """xhat of rows s, which are zero outside, and their rstd."""
    if not RMS:
        s = tl.where(inside, s - (tl.sum(s, axis=1) / C)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(s * s, axis=1) / C + eps)[:, None]
    return s * rstd, rstd


@triton.jit
def norm_modulate_forward_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    sum_ptr,
    y_ptr,
    rows,
    C,
    gate_tokens,
    gate_stride,
    scale_tokens,
    scale_stride,
    shift_tokens,
    shift_stride,
    eps,
    one,
    RMS: tl.constexpr,
    BRANCH: tl.constexpr,
    GATE: tl.constexpr,
    WEIGHT: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_C)
    at = row.to(tl.int64)[:, None] * C + col[None, :]
    inside = (row[:, None] < rows) & (col[None, :] < C)
    s = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            branch *= _shared(gate_ptr, row, gate_tokens, gate_stride, col, inside)
        stored = (s + branch).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, stored, mask=inside)
        s = stored.to(tl.float32)
    y, _ = _normed(s, inside, C, eps, RMS)
    if WEIGHT:
        y *= tl.load(weight_ptr + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
    if SCALE:
        y *= one + _shared(scale_ptr, row, scale_tokens, scale_stride, col, inside)
    if SHIFT:
        y += _shared(shift_ptr, row, shift_tokens, shift_stride, col, inside)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_modulate_backward_kernel(
    g_ptr,
    h_ptr,
    x_ptr,
    gate_ptr,
    weight_ptr,
    scale_ptr,
    dx_ptr,
    dbranch_ptr,
    rows,
    C,
    gate_tokens,
    gate_stride,
    scale_tokens,
    scale_stride,
    eps,
    one,
    RMS: tl.constexpr,
    BRANCH: tl.constexpr,
    GATE: tl.constexpr,
    WEIGHT: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_C)
    at = row.to(tl.int64)[:, None] * C + col[None, :]
    inside = (row[:, None] < rows) & (col[None, :] < C)
    c = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if WEIGHT:
        c *= tl.load(weight_ptr + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
    if SCALE:
        c *= one + _shared(scale_ptr, row, scale_tokens, scale_stride, col, inside)
    xhat, rstd = _normed(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), inside, C, eps, RMS)
    along = tl.sum(c * xhat, axis=1) / C
    dx = c - xhat * along[:, None]
    if not RMS:
        dx -= (tl.sum(c, axis=1) / C)[:, None]
    dx *= rstd
    if BRANCH:
        dx += tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if GATE:
        dbranch = dx * _shared(gate_ptr, row, gate_tokens, gate_stride, col, inside)
        tl.store(dbranch_ptr + at, dbranch.to(dbranch_ptr.dtype.element_ty), mask=inside)


def config(width: int) -> tuple[int, int, int]:
    """(BLOCK_C, ROWS, warps) for rows of this many channels. Raises ValueError above MAX_WIDTH."""
    for block, rows, warps in CONFIGS:
        if width <= block:
            return next_power_of_2(width), rows, warps
    raise ValueError(f"norm_modulate holds a row in registers: at most {MAX_WIDTH} channels, not {width}")


# Tokens that share a row of a modulation, and the distance of its rows; None: there is no such modulation.
_At = tuple[int, int] | None
_UNREAD = (1, 0)


def _shared_rows(t: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, _At]:
    """The memory of a modulation's rows, and how they lie."""
    if t.ndim == 1:
        return t.contiguous(), (rows, width)
    flat = t.reshape(-1, width)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    return flat, (rows // flat.shape[0], flat.stride(0))


@cache
def _forward(
    rows: int,
    width: int,
    gate: _At,
    scale: _At,
    shift: _At,
    eps: float,
    one: float,
    rms: bool,
    branch: bool,
    weight: bool,
) -> Prepared:
    """Takes x, branch, gate, weight, scale, shift, s and y."""
    block, rows_each, warps = config(width)
    return Prepared(
        *(norm_modulate_forward_kernel, (cdiv(rows, rows_each),)),
        *(rows, width, *(gate or _UNREAD), *(scale or _UNREAD), *(shift or _UNREAD), eps, one),
        RMS=rms,
        BRANCH=branch,
        GATE=gate is not None,
        WEIGHT=weight,
        SCALE=scale is not None,
        SHIFT=shift is not None,
        ROWS=rows_each,
        BLOCK_C=block,
        num_warps=warps,
    )


@cache
def _backward(
    rows: int, width: int, gate: _At, scale: _At, eps: float, one: float, rms: bool, branch: bool, weight: bool
) -> Prepared:
    """Takes g, h, x, gate, weight, scale, dx and dbranch."""
    block, rows_each, warps = config(width)
    return Prepared(
        *(norm_modulate_backward_kernel, (cdiv(rows, rows_each),)),
        *(rows, width, *(gate or _UNREAD), *(scale or _UNREAD), eps, one),
        RMS=rms,
        BRANCH=branch,
        GATE=gate is not None,
        WEIGHT=weight,
        SCALE=scale is not None,
        ROWS=rows_each,
        BLOCK_C=block,
        num_warps=warps,
    )


def norm_modulate_forward(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    one: float,
    rms: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the forward kernel on x [..., C].

    Returns:
        (y, s): like x; s is None without a branch.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    x = x.contiguous()
    y = torch.empty_like(x)
    total = None if branch is None else torch.empty_like(x)
    # Without a modulation x takes its place and is not read.
    gates, gate_at = (x, None) if gate is None else _shared_rows(gate, rows, width)
    scales, scale_at = (x, None) if scale is None else _shared_rows(scale, rows, width)
    shifts, shift_at = (x, None) if shift is None else _shared_rows(shift, rows, width)
    start = _forward(rows, width, gate_at, scale_at, shift_at, eps, one, rms, branch is not None, weight is not None)
    added, sums = (x, x) if branch is None else (branch.contiguous(), total)
    start(x, added, gates, x if weight is None else weight.contiguous(), scales, shifts, sums, y)
    return y, total


def norm_modulate_backward(
    g: torch.Tensor,
    h: torch.Tensor | None,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    one: float,
    rms: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the backward kernel for gradients g of y and h of s (None: zero); x: the input of the norm, s.

    Returns:
        (dx, dbranch): dbranch is None without a gate, where it equals dx.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    g, x = g.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    dbranch = None if gate is None else torch.empty_like(x)
    gates, gate_at = (x, None) if gate is None else _shared_rows(gate, rows, width)
    scales, scale_at = (x, None) if scale is None else _shared_rows(scale, rows, width)
    start = _backward(rows, width, gate_at, scale_at, eps, one, rms, h is not None, weight is not None)
    added, weights = g if h is None else h.contiguous(), x if weight is None else weight.contiguous()
    start(g, added, x, gates, weights, scales, dx, dx if dbranch is None else dbranch)
    return dx, dbranch


def signatures() -> list[dict]:
    """Every shipped configuration with all optional inputs, the form that takes most registers; and a plain one."""
    entries = []
    for kernel in (norm_modulate_forward_kernel, norm_modulate_backward_kernel):
        for dtype in ("bf16", "fp32"):
            for block, rows, warps in CONFIGS:
                given = dict.fromkeys(("BRANCH", "GATE", "WEIGHT", "SCALE", "SHIFT"), True)
                given |= {"RMS": False, "ROWS": rows, "BLOCK_C": block}
                entries.append(_entry(kernel, dtype, given, f"{dtype} {rows}x{block} w{warps}", warps))
    return entries


def _entry(kernel: triton.JITFunction, dtype: str, given: dict, config: str, warps: int) -> dict:
    types = {"eps": "fp32", "one": "fp32"}
    constexprs = {name: value for name, value in given.items() if name in kernel.arg_names}
    names = [name for name in kernel.arg_names if name not in constexprs]
    return {
        "kernel": kernel,
        "config": config,
        "signature": {name: types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32") for name in names},
        "constexprs": constexprs,
        "num_warps": warps,
        "num_stages": 1,
        "arch": None,
    }
