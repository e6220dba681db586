"""Activations y = f(v), or gated y = u f(v), of one or two projections; one pass over memory each way.

    gelu        f(v) = v Phi(v)                      f'(v) = Phi(v) + v phi(v)
    gelu_tanh   f(v) = v sigma(w(v))                 f'(v) = sigma + v sigma (1 - sigma) w'(v),
                w(v) = sqrt(8 / pi) (v + 0.044715 v^3)
    silu        f(v) = v sigma(v)                    f'(v) = sigma + v sigma (1 - sigma)

    backward    dv = g u f'(v)        du = g f(v)

with Phi and phi the standard normal distribution and density and sigma the logistic function (Hendrycks & Gimpel 2016;
Shazeer 2020). gelu_tanh is the usual one with tanh, because 1 + tanh(z) = 2 sigma(2 z).

Shapes: v, u, y, g, dv, du [T, D], computed in fp32. Rows may lie apart, so u and v may be parts of one projection. With
`beside` [T, E], y is [beside, u f(v)], [T, E + D]: the input of an output projection, without a pass to join the two.
Elements moved, with n = T D: forward 3 n, backward 5 n, without u 2 n and 3 n. Each element takes 25 to 40 FLOP, so
memory is the bound. It loses if D is not a multiple of 256 (idle lanes, unaligned rows) or if T D is so small that the
launch costs more than the work.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.launch import Prepared, cdiv

# (BLOCK, warps), largest first. A thread takes 8 elements, 16 bytes in bf16.
CONFIGS = [(1024, 4), (512, 2), (256, 1)]
FUNCTIONS = ("gelu", "gelu_tanh", "silu")


@triton.jit
def _logistic(w):
    """sigma(w) and sigma'(w) = sigma (1 - sigma), without the cancellation of 1 - sigma and without overflow."""
    e = tl.exp(-tl.abs(w))
    r = 1.0 / (1.0 + e)
    return tl.where(w >= 0, r, e * r), e * r * r


@triton.jit
def _factors(v, FUNCTION: tl.constexpr):
    """(p, s) with f(v) = v p and f'(v) = p + v s."""
    if FUNCTION == "gelu":
        p = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
        s = 0.3989422804014327 * tl.exp(-0.5 * v * v)
    elif FUNCTION == "gelu_tanh":
        p, s = _logistic(1.5957691216057308 * v * (1.0 + 0.044715 * v * v))
        s *= 1.5957691216057308 + 0.21406444881780073 * v * v
    else:
        p, s = _logistic(v)
    return p, s


@triton.jit
def activation_forward_kernel(
    v_ptr,
    u_ptr,
    beside_ptr,
    y_ptr,
    D,
    E,
    v_stride,
    u_stride,
    beside_stride,
    blocks,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    BESIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK
    col = first + tl.arange(0, BLOCK)
    if BESIDE:  # the blocks after those of v copy
        copied = col - tl.cdiv(D, BLOCK) * BLOCK
        within = (copied >= 0) & (copied < E)
        x = tl.load(beside_ptr + row * beside_stride + copied, mask=within)
        tl.store(y_ptr + row * (E + D) + copied, x, mask=within)
    inside = col < D
    v = tl.load(v_ptr + row * v_stride + col, mask=inside).to(tl.float32)
    p, _ = _factors(v, FUNCTION)
    y = v * p
    if GATED:
        y *= tl.load(u_ptr + row * u_stride + col, mask=inside).to(tl.float32)
    tl.store(y_ptr + row * (E + D) + E + col, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activation_backward_kernel(
    g_ptr,
    v_ptr,
    u_ptr,
    dv_ptr,
    du_ptr,
    D,
    g_stride,
    v_stride,
    u_stride,
    dv_stride,
    du_stride,
    blocks,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = col < D
    g = tl.load(g_ptr + row * g_stride + col, mask=inside).to(tl.float32)
    v = tl.load(v_ptr + row * v_stride + col, mask=inside).to(tl.float32)
    p, s = _factors(v, FUNCTION)
    if GATED:
        u = tl.load(u_ptr + row * u_stride + col, mask=inside).to(tl.float32)
        tl.store(du_ptr + row * du_stride + col, (g * (v * p)).to(du_ptr.dtype.element_ty), mask=inside)
        g *= u
    tl.store(dv_ptr + row * dv_stride + col, (g * (p + v * s)).to(dv_ptr.dtype.element_ty), mask=inside)


def config(width: int) -> tuple[int, int]:
    """(BLOCK, warps) of the largest block that divides a row of D elements; of the smallest if none does."""
    return next((row for row in CONFIGS if width % row[0] == 0), CONFIGS[-1])


@cache
def _distance(shape: torch.Size, strides: tuple[int, ...]) -> int | None:
    """The distance of the rows of x [..., D], if they have one and their channels are adjacent, else None."""
    if strides[-1] != 1:
        return None
    distance, span = None, 1
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if distance is None:
            distance = stride
        elif stride != distance * span:
            return None
        span *= size
    return shape[-1] if distance is None else distance


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [..., D] with adjacent channels and rows at one distance, and the distance. It copies no part of a matrix."""
    distance = _distance(x.shape, x.stride())
    return (x.contiguous(), x.shape[-1]) if distance is None else (x, distance)


@cache
def _forward(
    rows: int, width: int, extra: int, strides: tuple[int, int, int], function: str, gated: bool, beside: bool
) -> Prepared:
    """Takes v, u, beside and y. strides: distances of the rows of the first three."""
    block, warps = config(width)
    blocks = cdiv(width, block) + cdiv(extra, block)
    return Prepared(
        *(activation_forward_kernel, (rows * blocks,), width, extra, *strides, blocks),
        FUNCTION=function,
        GATED=gated,
        BESIDE=beside,
        BLOCK=block,
        num_warps=warps,
    )


@cache
def _backward(rows: int, width: int, strides: tuple[int, int, int, int, int], function: str, gated: bool) -> Prepared:
    """Takes g, v, u, dv and du. strides: distances of their rows."""
    block, warps = config(width)
    blocks = cdiv(width, block)
    return Prepared(
        *(activation_backward_kernel, (rows * blocks,), width, *strides, blocks),
        FUNCTION=function,
        GATED=gated,
        BLOCK=block,
        num_warps=warps,
    )


def activation_forward(
    v: torch.Tensor, u: torch.Tensor | None, function: str, beside: torch.Tensor | None = None
) -> torch.Tensor:
    """Launch the forward kernel: v, u [..., D], beside [..., E] -> y [..., E + D]."""
    *shape, width = v.shape
    extra = 0 if beside is None else beside.shape[-1]
    y = v.new_empty(*shape, extra + width)
    v, v_at = rows_of(v)
    u_rows, u_at = (v, v_at) if u is None else rows_of(u)
    beside_rows, beside_at = (v, v_at) if beside is None else rows_of(beside)
    strides = v_at, u_at, beside_at
    start = _forward(v.numel() // width, width, extra, strides, function, u is not None, beside is not None)
    start(v, u_rows, beside_rows, y)
    return y


def activation_backward(
    g: torch.Tensor, v: torch.Tensor, u: torch.Tensor | None, dv: torch.Tensor, du: torch.Tensor | None, function: str
) -> None:
    """Launch the backward kernel, which writes dv and du, whose rows lie at one distance, from g [..., D]."""
    width = v.shape[-1]
    (g, g_at), (v, v_at), (dv, dv_at) = rows_of(g), rows_of(v), rows_of(dv)
    u_rows, u_at = (v, v_at) if u is None else rows_of(u)
    du_rows, du_at = (dv, dv_at) if du is None else rows_of(du)
    strides = g_at, v_at, u_at, dv_at, du_at
    _backward(v.numel() // width, width, strides, function, u is not None)(g, v, u_rows, dv, du_rows)


def signatures() -> list[dict]:
    """Every function in bf16 and fp32, gated and beside another tensor, at the largest block and at the smallest."""
    entries = []
    for kernel in (activation_forward_kernel, activation_backward_kernel):
        for dtype in ("bf16", "fp32"):
            for function in FUNCTIONS:
                for block, warps in (CONFIGS[0], CONFIGS[-1]):
                    given = {"FUNCTION": function, "GATED": True, "BESIDE": True, "BLOCK": block}
                    constexprs = {name: value for name, value in given.items() if name in kernel.arg_names}
                    names = [name for name in kernel.arg_names if name not in constexprs]
                    entries.append(
                        {
                            "kernel": kernel,
                            "config": f"{dtype} {function} {block} w{warps}",
                            "signature": {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in names},
                            "constexprs": constexprs,
                            "num_warps": warps,
                            "num_stages": 1,
                            "arch": None,
                        }
                    )
    return entries
