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


def normed_guidance(y: torch.Tensor, scale: float | torch.Tensor, parts: str) -> torch.Tensor:
    """Classifier-free guidance that keeps, in each part of a picture, the norm of the conditional prediction.

    y: [2 B, C, h, w], unconditional half first; returns [B, C, h, w]. parts: "patches" of 2 x 2 latents with all
    channels, as in diffusers' `QwenImagePipeline`, or "rows" of one channel, as in its `Lumina2Pipeline`.
    """
    unconditional, conditional = y.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    if parts == "rows":
        norm, own = (torch.linalg.vector_norm(x, dim=3, keepdim=True) for x in (conditional, guided))
        return guided * (norm / own)
    ratio = _patch_norm(conditional) / _patch_norm(guided)
    return guided * ratio.repeat_interleave(2, 2).repeat_interleave(2, 3)


def limited_guidance(y: torch.Tensor, scale: float | torch.Tensor, limit: float) -> torch.Tensor:
    """Classifier-free guidance whose norm, by picture, is at most `limit` times that of the conditional prediction.

    y: [2 B, C, h, w], unconditional half first; returns [B, C, h, w]. Source: `cfg_normalization` of diffusers'
    `ZImagePipeline`.
    """
    unconditional, conditional = y.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    most, norm = (torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True) for x in (limit * conditional, guided))
    return guided * (most / norm).clamp(max=1)


def _patch_norm(y_BCHW: torch.Tensor) -> torch.Tensor:
    """[B, 1, h / 2, w / 2]."""
    patches = y_BCHW.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, h / 2, 2, w / 2, 2]
    return torch.linalg.vector_norm(patches, dim=(1, 3, 5)).unsqueeze(1)
