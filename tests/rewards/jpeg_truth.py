"""What the smooth JPEG estimate is measured against: real pictures and the byte counts of a real encoder."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def square_pictures(folder: Path, size: int) -> Iterator[np.ndarray]:
    """The middle square of every picture below `folder`, on white, scaled down to [size, size, 3] uint8.

    Pictures that are smaller than `size` are left out.
    """
    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file()):
        with Image.open(file) as opened:
            picture = opened.convert("RGBA")
        side = min(picture.size)
        if side < size:
            continue
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        square = white.convert("RGB").crop((left, top, left + side, top + side))
        yield np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def jpeg_bytes(picture_HWC: np.ndarray, quality: int = 95) -> int:
    """Size of the JPEG file that Pillow writes (4:2:0, standard Huffman tables)."""
    buffer = io.BytesIO()
    Image.fromarray(picture_HWC).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rho; ties share their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
