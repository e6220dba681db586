"""Colourfulness of a picture as people judge it.

Hasler and Suesstrunk, "Measuring colourfulness in natural images", SPIE 5007, 2003, the metric M^(3):

    rg = R - G,  yb = (R + G) / 2 - B                            on the 8-bit scale, per pixel
    M3 = sqrt(std(rg)^2 + std(yb)^2) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)

In the paper 0 is "not colourful", 33 "averagely", 59 "quite" and 109 "extremely colourful".
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Added under the roots, so that the gradient of a grey picture is zero and not NaN. Adds at most 1.3e-3 to a score.
_EPSILON = 1e-6


class Colorfulness(nn.Module):
    """M3 of each image; no weights."""

    def forward(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images_BCHW: [B, 3, H, W] in [0, 1]. Prompts and metadata are not used. Returns M3 >= 0, [B]."""
        images_BCHW = images_BCHW.to(torch.promote_types(images_BCHW.dtype, torch.float32)) * 255
        red, green, blue = images_BCHW.flatten(2).unbind(1)
        opponents_2BN = torch.stack((red - green, (red + green) / 2 - blue))
        spread_B = opponents_2BN.var(-1, correction=0).sum(0)
        strength_B = opponents_2BN.mean(-1).square().sum(0)
        return (spread_B + _EPSILON).sqrt() + 0.3 * (strength_B + _EPSILON).sqrt(), {}
