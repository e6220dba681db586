"""Guidance that is not linear in the two predictions; the linear part is `ops.guided_step`."""

import torch


def rescaled_guidance(y: torch.Tensor, scale: float | torch.Tensor, rescale: float) -> torch.Tensor:
    """Classifier-free guidance whose standard deviation is rescaled towards that of the conditional prediction.

    y: [2 B, ...], unconditional half first; returns [B, ...]. rescale (phi) in [0, 1]; 0 is plain guidance.
    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", eqs. 14 to 16.
    """
    unconditional, conditional = y.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    if rescale == 0:
        return guided
    dims = tuple(range(1, y.ndim))
    ratio = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (rescale * ratio + (1 - rescale))
