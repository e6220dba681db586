"""Guidance and the scheduler's affine update in one pass over memory.

Forward, for K prediction branches y_k (K = 2 under classifier-free guidance, else 1):

    out = a x + sum_k w_k y_k + sigma z

Adjoint, for the gradient g of out (z gets no gradient):

    dx = a g        dy_k = w_k g

Shapes: x, z, out, g, dx are [B, ...] and y, dy are [K * B, ...], branch-major, all contiguous in the same memory order.
Sums are fp32 for every storage dtype. Elements moved, with n those of x: forward (K + 3) n, adjoint (K + 2) n. Each
element takes 2 (K + 2) FLOP, so memory is the bound. It loses if x is tiny: the launch then costs more than the work.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.launch import Prepared, cdiv

BLOCK = 1024


@triton.jit
def guided_step_kernel(
    x_ptr, y_ptr, z_ptr, out_ptr, a, w0, w1, sigma, n, TWO: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    out = a * tl.load(x_ptr + i, mask=inside).to(tl.float32) + w0 * tl.load(y_ptr + i, mask=inside).to(tl.float32)
    if TWO:
        out += w1 * tl.load(y_ptr + n + i, mask=inside).to(tl.float32)
    if NOISE:
        out += sigma * tl.load(z_ptr + i, mask=inside).to(tl.float32)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def guided_step_adjoint_kernel(g_ptr, dx_ptr, dy_ptr, a, w0, w1, n, TWO: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    g = tl.load(g_ptr + i, mask=inside).to(tl.float32)
    tl.store(dx_ptr + i, (a * g).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dy_ptr + i, (w0 * g).to(dy_ptr.dtype.element_ty), mask=inside)
    if TWO:
        tl.store(dy_ptr + n + i, (w1 * g).to(dy_ptr.dtype.element_ty), mask=inside)


@cache
def _forward(n: int, two: bool, noise: bool) -> Prepared:
    """Takes x, y, noise, out, a, both weights and sigma."""
    return Prepared(guided_step_kernel, (cdiv(n, BLOCK),), n, TWO=two, NOISE=noise, BLOCK=BLOCK)


@cache
def _adjoint(n: int, two: bool) -> Prepared:
    """Takes g, dx, dy, a and both weights."""
    return Prepared(guided_step_adjoint_kernel, (cdiv(n, BLOCK),), n, TWO=two, BLOCK=BLOCK)


def guided_step(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor | None, a: float, weights: tuple[float, ...], sigma: float
) -> torch.Tensor:
    """Launch the forward kernel; shapes as in the module docstring. Returns out in x's dtype."""
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    noise = x if z is None else z.contiguous()
    _forward(x.numel(), len(weights) == 2, z is not None)(x, y, noise, out, a, weights[0], weights[-1], sigma)
    return out


def guided_step_adjoint(
    g: torch.Tensor, a: float, weights: tuple[float, ...], y_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the adjoint kernel. Returns (dx in g's dtype, dy in y_dtype with len(weights) * B rows)."""
    g = g.contiguous()
    dx = torch.empty_like(g)
    dy = torch.empty((len(weights) * g.shape[0], *g.shape[1:]), dtype=y_dtype, device=g.device)
    _adjoint(g.numel(), len(weights) == 2)(g, dx, dy, a, weights[0], weights[-1])
    return dx, dy


def signatures() -> list[dict]:
    """Both kernels in the form that the chain launches: fp32 latents, bf16 predictions, two branches, noise."""
    entries = []
    for kernel, flags in (
        (guided_step_kernel, {"TWO": True, "NOISE": True, "BLOCK": BLOCK}),
        (guided_step_adjoint_kernel, {"TWO": True, "BLOCK": BLOCK}),
    ):
        types = {"y_ptr": "*bf16", "dy_ptr": "*bf16", "n": "i32"}
        names = [name for name in kernel.arg_names if name not in flags]
        entries.append(
            {
                "kernel": kernel,
                "config": f"fp32/bf16 {BLOCK} w4",
                "signature": {name: types.get(name, "*fp32" if name.endswith("_ptr") else "fp32") for name in names},
                "constexprs": flags,
                "num_warps": 4,
                "num_stages": 1,
                "arch": None,
            }
        )
    return entries
