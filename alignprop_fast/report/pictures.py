"""Grids of pictures with captions, also before and after training."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from alignprop_fast.files import whole
from alignprop_fast.report.style import GREY, INK, font

if TYPE_CHECKING:
    from torch import Tensor

_CELL = 192  # the least pixels of a picture in a grid; smaller ones are enlarged by a whole factor
_LARGEST_CELL = 512
MARGIN, LINE = 12, 19


@dataclass(frozen=True)
class Pictures:
    """Pictures, each with its prompt and seed.

    rewards: one for each picture, or empty if unknown. mean_parts: the mean of each part of the reward.
    """

    images: tuple[Image.Image, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    rewards: tuple[float, ...] = ()
    mean_parts: dict[str, float] = field(default_factory=dict)

    def caption(self, index: int) -> str:
        """`0.712`, or `seed 3` if the reward is unknown."""
        return f"{self.rewards[index]:.3f}" if self.rewards else f"seed {self.seeds[index]}"

    @property
    def mean_reward(self) -> float:
        return sum(self.rewards) / len(self.rewards) if self.rewards else math.nan


def to_images(images_BCHW: Tensor) -> tuple[Image.Image, ...]:
    """images_BCHW: [B, 3, H, W] in [0, 1] -> B pictures with 8 bits per channel."""
    pixels_BHWC = (images_BCHW.detach().float().clamp(0, 1) * 255).round().permute(0, 2, 3, 1).cpu().numpy()
    return tuple(Image.fromarray(pixels_HWC.astype(np.uint8)) for pixels_HWC in pixels_BHWC)


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a whole PNG."""
    with whole(path) as temporary:
        image.save(temporary, format="PNG")


def save_grid(path: str | Path, pictures: Pictures, title: str) -> None:
    """Write a PNG with all pictures in rows, and under each its prompt and its reward (or seed)."""
    images = enlarged(pictures.images)
    cells = [_cell([image], pictures.prompts[i], pictures.caption(i)) for i, image in enumerate(images)]
    save_image(_page(title, cells, columns=_columns(len(cells))), path)


def save_before_after(path: str | Path, before: Pictures, after: Pictures, title: str) -> None:
    """Write a PNG of pairs: each prompt and seed before (above) and after (below), with both rewards."""
    if (before.prompts, before.seeds) != (after.prompts, after.seeds):
        raise ValueError("before and after must show the same prompts and seeds")
    pairs = zip(enlarged(before.images), enlarged(after.images), strict=True)
    cells = [_pair(first, second, before, after, i) for i, (first, second) in enumerate(pairs)]
    save_image(_page(title, cells, columns=_columns(len(cells))), path)


def enlarged(images: Iterable[Image.Image]) -> list[Image.Image]:
    """Enlarge small pictures by a whole factor, so that they stay crisp; shrink large ones."""
    result = []
    for image in images:
        factor = -(-_CELL // max(image.size))
        if factor > 1:
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        elif max(image.size) > _LARGEST_CELL:
            image = image.copy()
            image.thumbnail((_LARGEST_CELL, _LARGEST_CELL), Image.Resampling.LANCZOS)
        result.append(image)
    return result


def _columns(count: int) -> int:
    return count if count <= 4 else min(8, math.ceil(count / 2))


def _pair(first: Image.Image, second: Image.Image, before: Pictures, after: Pictures, i: int) -> Image.Image:
    change = ""
    if before.rewards and after.rewards:
        change = f"{before.rewards[i]:.3f} \u2192 {after.rewards[i]:.3f}"
    return _cell([first, second], before.prompts[i], change or f"seed {before.seeds[i]}")


def _cell(images: list[Image.Image], prompt: str, note: str) -> Image.Image:
    """Stacked pictures, then the prompt in at most two lines, then a note in grey."""
    width, gap = images[0].width, 4
    lines = _wrapped(prompt, width)
    pictures_height = sum(image.height for image in images) + gap * (len(images) - 1)
    cell = Image.new("RGB", (width, pictures_height + 8 + 3 * LINE), "white")
    y = 0
    for image in images:
        cell.paste(image, (0, y))
        y += image.height + gap
    draw = ImageDraw.Draw(cell)
    for line in lines:
        draw.text((0, y + 2), line, fill=INK, font=font(14))
        y += LINE
    draw.text((0, y + 2), note, fill=GREY, font=font(13))
    return cell


def _wrapped(text: str, width: int) -> list[str]:
    characters = max(8, int(width / font(14).getlength("n")))
    return textwrap.wrap(text, characters, max_lines=2, placeholder=" \u2026") or [""]


def _page(title: str, cells: list[Image.Image], columns: int) -> Image.Image:
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    rows = math.ceil(len(cells) / columns)
    top = 3 * MARGIN + LINE
    inner = max(columns * (width + MARGIN), math.ceil(font(17, bold=True).getlength(title)) + MARGIN)
    page = Image.new("RGB", (MARGIN + inner, top + rows * (height + MARGIN)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=font(17, bold=True))
    for i, cell in enumerate(cells):
        page.paste(cell, (MARGIN + i % columns * (width + MARGIN), top + i // columns * (height + MARGIN)))
    return page
