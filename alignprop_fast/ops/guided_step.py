"""guided_step: classifier-free guidance and the scheduler's affine update, out = a x + sum_k w_k y_k + sigma z.

With two branches (unconditional u, conditional c) and guidance scale s, u + s (c - u) enters an update of weight b
as w = (b (1 - s), b s) (Ho & Salimans 2022, eq. 6). The op is linear, so its adjoint needs only the coefficients.
Autograd does not record these functions; the chain (`runtime/chain.py`) calls the adjoint itself.
"""

from collections.abc import Sequence

import torch

from alignprop_fast.ops import backend as backends
from alignprop_fast.ops.backend import Launch

# Guided and unguided predictions; the kernels read no more branches.
MAX_BRANCHES = 2


def backend(x: torch.Tensor, branches: int = MAX_BRANCHES) -> str:
    """The implementation for x: "triton" for up to two branches, or "reference"."""
    return backends.backend(x, "guided_step") if branches <= MAX_BRANCHES else "reference"


def guided_step_reference(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor | None, a: float, weights: Sequence[float], sigma: float
) -> torch.Tensor:
    """Plain PyTorch in fp32 (float64 stays float64). x, z: [B, ...]; y: [len(weights) * B, ...]; returns x's dtype."""
    compute = torch.promote_types(x.dtype, torch.float32)
    out = a * x.to(compute)
    for weight, branch in zip(weights, y.chunk(len(weights)), strict=True):
        out = out.add_(branch.to(compute), alpha=weight)
    if z is not None:
        out = out.add_(z.to(compute), alpha=sigma)
    return out.to(x.dtype)


def guided_step_adjoint_reference(
    g: torch.Tensor, a: float, weights: Sequence[float], y_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adjoint of `guided_step_reference`: (a g, [w_0 g, ..., w_K g] stacked along the batch in y_dtype)."""
    return a * g, torch.cat([(weight * g).to(y_dtype) for weight in weights])


def _launch_forward(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor | None, a: float, weights: Sequence[float], sigma: float
) -> torch.Tensor:
    from alignprop_fast.kernels import guided_step as kernels

    return kernels.guided_step(x, y, z, a, tuple(weights), sigma)


def _launch_adjoint(
    g: torch.Tensor, a: float, weights: Sequence[float], y_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    from alignprop_fast.kernels import guided_step as kernels

    return kernels.guided_step_adjoint(g, a, tuple(weights), y_dtype)


def _fake_forward(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor | None, a: float, weights: Sequence[float], sigma: float
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_adjoint(
    g: torch.Tensor, a: float, weights: Sequence[float], y_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return g.new_empty(g.shape), g.new_empty((len(weights) * g.shape[0], *g.shape[1:]), dtype=y_dtype)


_triton_forward = Launch("guided_step", "guided_step", _launch_forward, guided_step_reference, _fake_forward)
_triton_adjoint = Launch(
    "guided_step_adjoint", "guided_step", _launch_adjoint, guided_step_adjoint_reference, _fake_adjoint
)


def guided_step(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor | None, a: float, weights: Sequence[float], sigma: float = 0.0
) -> torch.Tensor:
    """One denoising update, out = a x + sum_k weights[k] y_k + sigma z, in one pass over memory.

    Args:
        x: latents [B, ...].
        y: predictions [len(weights) * B, ...], branch-major (unconditional first), any floating dtype.
        z: step noise [B, ...], or None for none.
        a, weights, sigma: the coefficients of the step (`sampling.StepTable`).

    Returns:
        The next latents [B, ...] in x's dtype; sums are taken in fp32.
    """
    if backend(x, len(weights)) == "triton":
        return _triton_forward(x, y, z, a, list(weights), sigma)
    return guided_step_reference(x, y, z, a, weights, sigma)


def guided_step_adjoint(
    g: torch.Tensor, a: float, weights: Sequence[float], y_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `guided_step` for x [B, ...] and for y [len(weights) * B, ...], from the gradient g [B, ...]."""
    if backend(g, len(weights)) == "triton":
        return _triton_adjoint(g, a, list(weights), y_dtype)
    return guided_step_adjoint_reference(g, a, weights, y_dtype)
