"""Differentiable image processor on tensors: resize, centre crop, normalise.

The steps and constants come from the processor's file. Resizing uses PIL's antialiased filter, which torch has too. The
only difference is that PIL rounds to 8 bits after each of its two passes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# OpenAI's values, which most later models use.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# By Pillow's numbers. Other filters have no antialiased counterpart in torch.
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
# Defaults of transformers' CLIPImageProcessor for keys missing in the file.
_CLIP_DEFAULTS = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}


@dataclass(frozen=True)
class Preprocess:
    """Images in [0, 1] of any size -> input of a vision tower. None skips a step."""

    shortest_edge: int | None = None  # pixels; the other edge keeps the proportions
    exact_size: tuple[int, int] | None = None  # (height, width), instead of shortest_edge
    longest_edge: int | None = None  # pixels, instead of both; black padding makes the image a square
    resampling: str = "bicubic"
    clip: bool = True  # to [0, 1] after each direction, as in PIL; False if the processor resizes float tensors
    crop: tuple[int, int] | None = None  # (height, width)
    round_crop: bool = False  # if the margin is odd, round half of it (to even), like torchvision, or truncate it
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    @classmethod
    def from_folder(cls, folder: Path, defaults: Mapping[str, Any] | None = None) -> Preprocess:
        """Read a CLIP folder's `preprocessor_config.json`, or its part of transformers 5's `processor_config.json`.

        defaults: of a processor other than CLIP's for keys missing in the file, if they differ from CLIP's.
        Raises FileNotFoundError if the folder has neither file, ValueError if the file cannot be understood.
        """
        file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"{folder} has no {_FILES[0]}, which says how to prepare images; copy it from the model's source"
            )
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            return cls._from_config(_CLIP_DEFAULTS | dict(defaults or {}) | stored.get("image_processor", stored))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is damaged or of an unknown kind ({error}); copy it again") from error

    @classmethod
    def _from_config(cls, config: dict[str, Any]) -> Preprocess:
        size = config["size"] if isinstance(config["size"], dict) else {"shortest_edge": config["size"]}
        crop = config["crop_size"]
        crop = (int(crop["height"]), int(crop["width"])) if isinstance(crop, dict) else (int(crop), int(crop))
        exact = None if size.get("shortest_edge") else (int(size["height"]), int(size["width"]))
        if config["resample"] not in _RESAMPLING:
            raise ValueError(f"resample {config['resample']} is neither 2 (bilinear) nor 3 (bicubic)")
        return cls(
            shortest_edge=size.get("shortest_edge") if config["do_resize"] else None,
            exact_size=exact if config["do_resize"] else None,
            resampling=_RESAMPLING[config["resample"]],
            crop=crop if config["do_center_crop"] else None,
            mean=tuple(config["image_mean"]) if config["do_normalize"] else cls.mean,
            std=tuple(config["image_std"]) if config["do_normalize"] else cls.std,
        )

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1], any float dtype -> [B, 3, height, width] after resize and crop in fp32 or wider."""
        images_BCHW = at_least_fp32(images_BCHW)
        images_BCHW = self._centre_crop(self._resize(images_BCHW))
        mean_C11 = images_BCHW.new_tensor(self.mean)[:, None, None]
        std_C11 = images_BCHW.new_tensor(self.std)[:, None, None]
        return (images_BCHW - mean_C11) / std_C11

    def _resize(self, images_BCHW: Tensor) -> Tensor:
        height, width = images_BCHW.shape[-2:]
        size = self.exact_size or (height, width)
        if self.shortest_edge is not None:
            short = min(height, width)
            size = (self.shortest_edge * height // short, self.shortest_edge * width // short)
        if self.longest_edge is not None:
            scale = self.longest_edge / max(height, width)
            size = (round(height * scale), round(width * scale))
        if size == (height, width):
            return self._square(images_BCHW)
        # Bicubic overshoots at edges, but 8-bit pictures cannot. PIL resizes rows, clips, resizes columns, clips.
        # (Since version 13 columns come first if the height shrinks more than the width; here that changes only
        # rounding.)
        for target in ((height, size[1]), size):
            images_BCHW = _interpolate(images_BCHW, target, self.resampling)
            images_BCHW = images_BCHW.clamp(0, 1) if self.clip else images_BCHW
        return self._square(images_BCHW)

    def _square(self, images_BCHW: Tensor) -> Tensor:
        if self.longest_edge is None:
            return images_BCHW
        down, across = (self.longest_edge - edge for edge in images_BCHW.shape[-2:])
        return F.pad(images_BCHW, (across // 2, across - across // 2, down // 2, down - down // 2))

    def _centre_crop(self, images_BCHW: Tensor) -> Tensor:
        if self.crop is None:
            return images_BCHW
        height, width = images_BCHW.shape[-2:]
        if height < self.crop[0] or width < self.crop[1]:
            raise ValueError(
                f"the image processor cuts {self.crop[0]} x {self.crop[1]} pixels out of images of {height} x {width}"
            )
        margins = (height - self.crop[0], width - self.crop[1])
        top, left = (round(margin / 2) if self.round_crop else margin // 2 for margin in margins)
        return images_BCHW[..., top : top + self.crop[0], left : left + self.crop[1]]


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision becomes fp32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A `with` block without autocast on x's device. Meta tensors have no autocast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


_FILES = ("preprocessor_config.json", "processor_config.json")


def _interpolate(images_BCHW: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """The antialiased resize. Its backward pass on a GPU adds atomically, so deterministic mode uses two products."""
    if not (images_BCHW.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return F.interpolate(images_BCHW, size=size, mode=mode, antialias=True)
    with without_autocast(images_BCHW):
        down, across = (
            _resize_matrix(edge, target, mode).to(images_BCHW)
            for edge, target in zip(images_BCHW.shape[-2:], size, strict=True)
        )
        return down @ images_BCHW @ across.T


@lru_cache(maxsize=8)
def _resize_matrix(before: int, after: int, mode: str) -> Tensor:
    """[after, before]: the matrix of the resize of one edge."""
    return F.interpolate(torch.eye(before)[None, None], size=(after, before), mode=mode, antialias=True)[0, 0]
