"""Compressibility and incompressibility: the JPEG file size, made differentiable.

DDPO (Black et al., 2023, section 5.1; also an objective of AlignProp) rewards the size of the image's JPEG file at
quality 95, in kB of 1000 bytes: incompressibility = size, compressibility = -size. Here the size is the smooth estimate
of `jpeg.py`. It is mostly within a few per cent of the true size, so scores are comparable with DDPO's.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from alignprop_fast.rewards.jpeg import JpegSize


class Incompressibility(nn.Module):
    """Estimated JPEG size in kB: detailed, noisy images score high."""

    def __init__(self) -> None:
        super().__init__()
        self.size = JpegSize(quality=95)

    def forward(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images_BCHW: [B, 3, H, W] in [0, 1], any size. Prompts and metadata are not used. Returns kB, [B]."""
        return self.size(images_BCHW), {}


class Compressibility(Incompressibility):
    """Minus the estimated JPEG size in kB: smooth, plain images score high."""

    def forward(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Incompressibility`, with the other sign."""
        return -self.size(images_BCHW), {}
