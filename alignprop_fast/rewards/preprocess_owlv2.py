"""OWLv2's image processor on tensors: pads right and below with black to a square, then resizes like scikit-image.

If the picture shrinks, that resize first blurs it by a Gaussian of deviation (scale - 1) / 2. Then it interpolates
linearly at the new places, with the picture mirrored at its outermost pixels. Along each edge both steps are linear and
fixed, so here they are one matrix: pixels = R_height x R_width^T.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD, at_least_fp32, without_autocast


@dataclass(frozen=True)
class Owlv2Preprocess:
    """Images in [0, 1] of any size -> [B, 3, height, width], normalised."""

    size: tuple[int, int] = (960, 960)
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def from_folder(cls, folder: Path) -> Owlv2Preprocess:
        """Read `preprocessor_config.json`, if there is one. Raises ValueError if the file is damaged."""
        file = folder / "preprocessor_config.json"
        if not file.is_file():
            return cls()
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            size = stored.get("size", {"height": 960, "width": 960})
            mean, std = stored.get("image_mean", cls.mean), stored.get("image_std", cls.std)
            return cls((int(size["height"]), int(size["width"])), tuple(mean), tuple(std))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is damaged or of an unknown kind ({error}); copy it again") from error

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1], any float dtype -> [B, 3, height, width] in fp32 or wider."""
        images_BCHW = at_least_fp32(images_BCHW)
        height, width = images_BCHW.shape[-2:]
        edge = max(height, width)
        square_BCHW = F.pad(images_BCHW, (0, edge - width, 0, edge - height))
        # Autocast would run the products in half precision.
        with without_autocast(images_BCHW):
            down, across = (_resize_matrix(edge, target).to(square_BCHW) for target in self.size)
            resized_BCHW = down @ square_BCHW @ across.t()
        mean_C11, std_C11 = (resized_BCHW.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (resized_BCHW - mean_C11) / std_C11


@lru_cache(maxsize=8)
def _resize_matrix(before: int, after: int) -> Tensor:
    """[after, before], float64: blur and linear interpolation of one edge."""
    scale = before / after
    places = (torch.arange(after, dtype=torch.float64) + 0.5) * scale - 0.5
    low = places.floor()
    weights = torch.stack((1 - (places - low), places - low), 1)
    return _at(torch.stack((low, low + 1), 1), weights, before) @ _blur(before, max(0.0, (scale - 1) / 2))


def _blur(size: int, deviation: float) -> Tensor:
    """[size, size]: a Gaussian cut off at four deviations (scipy's rule)."""
    radius = math.floor(4 * deviation + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / deviation).square()) if radius else torch.ones(1, dtype=torch.float64)
    places = torch.arange(size, dtype=torch.float64)[:, None] + offsets
    return _at(places, (kernel / kernel.sum()).expand_as(places), size)


def _at(places_NK: Tensor, weights_NK: Tensor, size: int) -> Tensor:
    """[N, size]: weight k of row n at place k, mirrored into 0..size-1 without repeating the outermost pixel."""
    period = max(1, 2 * (size - 1))
    index_NK = places_NK.long() % period
    index_NK = torch.minimum(index_NK, period - index_NK).clamp_max(size - 1)
    return places_NK.new_zeros(len(places_NK), size).scatter_add(1, index_NK, weights_NK)
