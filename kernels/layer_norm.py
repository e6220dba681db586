"""Layer normalisation with a frozen affine map, with the residual addition in the same pass over memory.

Forward, over the C channels of each token (Ba et al. 2016, eq. 4):

    s = x + residual        y = gamma * xhat + beta,   xhat = (s - mean(s)) * rstd,   rstd = (var(s) + eps)^-1/2

Backward, for the gradients g of y and h of s; gamma and beta are frozen:

    dx = dresidual = rstd * (c - mean(c) - xhat * mean(c * xhat)) + h,   c = g * gamma

Shapes: x, residual, s, y, g, h, dx [T, C], contiguous; gamma, beta [C]; mean, rstd [T] in fp32. All sums are fp32. The
statistics are taken of s after rounding to its storage dtype, so that forward and backward see the same numbers.
Elements moved, with n = T C: forward 2 n (4 n with a residual), backward 3 n (4 n with h). Each element takes 8 and 12
FLOP, so memory is the bound. Registers hold a whole row, padded to a power of two. If C is just above a power of two
(640, 1280), lanes idle; that costs issue slots, not bytes. It loses on few short rows, which do not fill the chip.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.launch import cdiv, launch, next_power_of_2

# (largest padded width, tokens per program, warps); a thread takes 16 to 32 elements.
CONFIGS = [(256, 8, 4), (512, 4, 4), (1024, 2, 4), (2048, 1, 4), (4096, 1, 8), (8192, 1, 16)]
MAX_WIDTH = CONFIGS[-1][0]


@triton.jit
def layer_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    gamma_ptr,
    beta_ptr,
    sum_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    C,
    eps,
    RESIDUAL: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_C)
    at = row[:, None] * C + col[None, :]
    inside = (row[:, None] < rows) & (col[None, :] < C)
    s = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        s += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        stored = s.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, stored, mask=inside)
        s = stored.to(tl.float32)
    mean = tl.sum(s, axis=1) / C
    centred = tl.where(inside, s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    y = centred * rstd[:, None]
    if SCALE:
        y *= tl.load(gamma_ptr + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
    if SHIFT:
        y += tl.load(beta_ptr + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def layer_norm_backward_kernel(
    g_ptr,
    h_ptr,
    x_ptr,
    gamma_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    rows,
    C,
    RESIDUAL: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_C)
    at = row[:, None] * C + col[None, :]
    inside = (row[:, None] < rows) & (col[None, :] < C)
    mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    c = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        c *= tl.load(gamma_ptr + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    xhat = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
    along = tl.sum(c * xhat, axis=1) / C
    dx = (c - (tl.sum(c, axis=1) / C)[:, None] - xhat * along[:, None]) * rstd[:, None]
    if RESIDUAL:
        dx += tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@cache
def config(width: int) -> tuple[int, int, int]:
    """(BLOCK_C, ROWS, warps) for rows of this many channels. Raises ValueError above MAX_WIDTH."""
    for block, rows, warps in CONFIGS:
        if width <= block:
            return next_power_of_2(width), rows, warps
    raise ValueError(f"layer_norm holds a row in registers: at most {MAX_WIDTH} channels, not {width}")


def layer_norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward kernel on x [..., C].

    Returns:
        (y, s, mean, rstd): y and s like x (s is empty without a residual), mean and rstd [T] in fp32.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    block, rows_each, warps = config(width)
    x = x.contiguous()
    y = torch.empty_like(x)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    launch(
        layer_norm_forward_kernel,
        (cdiv(rows, rows_each),),
        x,
        x if residual is None else residual.contiguous(),
        x if gamma is None else gamma.contiguous(),
        x if beta is None else beta.contiguous(),
        total,
        y,
        mean,
        rstd,
        rows,
        width,
        eps,
        RESIDUAL=residual is not None,
        SCALE=gamma is not None,
        SHIFT=beta is not None,
        ROWS=rows_each,
        BLOCK_C=block,
        num_warps=warps,
    )
    return y, total, mean, rstd


def layer_norm_backward(
    g: torch.Tensor,
    h: torch.Tensor | None,
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> torch.Tensor:
    """Launch the backward kernel: the gradient of x [..., C] for gradients g of y and h of s (None: zero)."""
    width = x.shape[-1]
    block, rows_each, warps = config(width)
    g, x = g.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    launch(
        layer_norm_backward_kernel,
        (cdiv(mean.numel(), rows_each),),
        g,
        g if h is None else h.contiguous(),
        x,
        x if gamma is None else gamma.contiguous(),
        mean,
        rstd,
        dx,
        mean.numel(),
        width,
        RESIDUAL=h is not None,
        SCALE=gamma is not None,
        ROWS=rows_each,
        BLOCK_C=block,
        num_warps=warps,
    )
    return dx


def signatures() -> list[dict]:
    """Every shipped configuration, with residual and affine map, the form that takes most registers."""
    floats = {"rows": "i32", "C": "i32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "eps": "fp32"}
    entries = []
    for kernel in (layer_norm_forward_kernel, layer_norm_backward_kernel):
        for dtype in ("bf16", "fp32"):
            for block, rows, warps in CONFIGS:
                given = {"RESIDUAL": True, "SCALE": True, "SHIFT": True, "ROWS": rows, "BLOCK_C": block}
                constexprs = {name: value for name, value in given.items() if name in kernel.arg_names}
                names = [name for name in kernel.arg_names if name not in constexprs]
                entries.append(
                    {
                        "kernel": kernel,
                        "config": f"{dtype} {rows}x{block} w{warps}",
                        "signature": {name: floats.get(name, f"*{dtype}") for name in names},
                        "constexprs": constexprs,
                        "num_warps": warps,
                        "num_stages": 1,
                        "arch": None,
                    }
                )
    return entries
