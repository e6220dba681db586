"""Latents as tokens, patches of 2 x 2 with channels last (Z-Image, Lumina 2), and rows of different lengths."""

import torch

Tensor = torch.Tensor


def as_tokens(x_BCHW: Tensor) -> Tensor:
    """[B, C, 2 R, 2 S] as [B, R S, 4 C]."""
    patches = x_BCHW.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, R, 2, S, 2]
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def from_tokens(y_BNC: Tensor, rows: int) -> Tensor:
    """Undo `as_tokens` of R rows."""
    patches = y_BNC.unflatten(2, (2, 2, -1)).unflatten(1, (rows, -1))  # [B, R, S, 2, 2, C]
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def is_before(count: int, ends_B: Tensor) -> Tensor:
    """[B, count], True for places before the end."""
    return torch.arange(count, device=ends_B.device) < ends_B[:, None]
