"""The gated activation y = u * gelu(v) of a projection [u, v], exact (erf) gelu, one pass over memory each way.

Forward:   y = u v Phi(v)
Backward:  du = g v Phi(v)        dv = g u (Phi(v) + v phi(v))

with Phi and phi the standard normal distribution and density (Hendrycks & Gimpel 2016; Shazeer 2020). Shapes: uv, duv
[T, 2 D] and y, g [T, D], contiguous; computed in fp32. Elements moved, with n = T D: forward 3 n, backward 5 n. Each
element takes about 25 and 40 FLOP with the erf, so memory is the bound. It loses if D is not a multiple of 256 (idle
lanes, unaligned rows) or if T D is so small that the launch costs more than the work.
"""

import torch
import triton
import triton.language as tl

from alignprop_fast.kernels.launch import cdiv, launch

# (BLOCK, warps), largest first. A thread takes 8 elements, 16 bytes in bf16.
CONFIGS = [(1024, 4), (512, 2), (256, 1)]


@triton.jit
def _phi_and_cdf(v):
    """Density and distribution function of the standard normal."""
    return 0.3989422804014327 * tl.exp(-0.5 * v * v), 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))


@triton.jit
def geglu_forward_kernel(uv_ptr, y_ptr, D, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = col < D
    u = tl.load(uv_ptr + row * (2 * D) + col, mask=inside).to(tl.float32)
    v = tl.load(uv_ptr + row * (2 * D) + D + col, mask=inside).to(tl.float32)
    _, cdf = _phi_and_cdf(v)
    tl.store(y_ptr + row * D + col, (u * (v * cdf)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def geglu_backward_kernel(g_ptr, uv_ptr, duv_ptr, D, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = col < D
    g = tl.load(g_ptr + row * D + col, mask=inside).to(tl.float32)
    u = tl.load(uv_ptr + row * (2 * D) + col, mask=inside).to(tl.float32)
    v = tl.load(uv_ptr + row * (2 * D) + D + col, mask=inside).to(tl.float32)
    density, cdf = _phi_and_cdf(v)
    du, dv = g * (v * cdf), g * u * (cdf + v * density)
    tl.store(duv_ptr + row * (2 * D) + col, du.to(duv_ptr.dtype.element_ty), mask=inside)
    tl.store(duv_ptr + row * (2 * D) + D + col, dv.to(duv_ptr.dtype.element_ty), mask=inside)


def config(width: int) -> tuple[int, int]:
    """(BLOCK, warps) of the largest block that divides a row of D elements; of the smallest if none does."""
    return next((row for row in CONFIGS if width % row[0] == 0), CONFIGS[-1])


def geglu_forward(uv: torch.Tensor) -> torch.Tensor:
    """Launch the forward kernel: uv [..., 2 D] -> y [..., D]."""
    width = uv.shape[-1] // 2
    block, warps = config(width)
    uv = uv.contiguous()
    y = uv.new_empty((*uv.shape[:-1], width))
    blocks = cdiv(width, block)
    rows = y.numel() // width
    launch(geglu_forward_kernel, (rows * blocks,), uv, y, width, blocks, BLOCK=block, num_warps=warps)
    return y


def geglu_backward(g: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    """Launch the backward kernel: the gradient of uv [..., 2 D] from g [..., D]."""
    width = g.shape[-1]
    block, warps = config(width)
    g, uv = g.contiguous(), uv.contiguous()
    duv = torch.empty_like(uv)
    blocks = cdiv(width, block)
    rows = g.numel() // width
    launch(geglu_backward_kernel, (rows * blocks,), g, uv, duv, width, blocks, BLOCK=block, num_warps=warps)
    return duv


def signatures() -> list[dict]:
    """Every shipped configuration in bf16 and fp32."""
    entries = []
    for kernel in (geglu_forward_kernel, geglu_backward_kernel):
        for dtype in ("bf16", "fp32"):
            for block, warps in CONFIGS:
                names = [name for name in kernel.arg_names if name != "BLOCK"]
                entries.append(
                    {
                        "kernel": kernel,
                        "config": f"{dtype} {block} w{warps}",
                        "signature": {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in names},
                        "constexprs": {"BLOCK": block},
                        "num_warps": warps,
                        "num_stages": 1,
                        "arch": None,
                    }
                )
    return entries
