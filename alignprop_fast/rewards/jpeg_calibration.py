"""Fits the constants of `jpeg.py` to the byte counts of a real encoder, and measures the error of the estimate.

    python -m alignprop_fast.rewards.jpeg_calibration FOLDER [FOLDER ...] [--sizes 64 256 512] [--limit 400]

Each folder is one set of pictures, used at each size. The fit minimises the squared relative error on every other
picture, with equal weight for each set and size. The table is measured on the other half, once with the fitted
constants and once with those in the code. Those in the code come from the 12 photographs in `tests/rewards/photos`, 76
wallpapers (Debian packages mate-backgrounds, gnome-backgrounds, plasma-workspace-wallpapers), 400 stamps (Debian
tuxpaint-stamps-default) and 300 emoji (Noto, Fluent and Twemoji).
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from alignprop_fast.rewards.jpeg import _BITS_PER_FEATURE, _HEADER_BYTES, JpegSize

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_SMALLEST_SET = 4


def square_pictures(folder: Path, size: int) -> Iterator[Tensor]:
    """The central square of every picture below `folder`, on white, scaled down to [3, size, size] in [0, 1].

    Values are exact 8-bit values. Pictures smaller than `size` are left out.
    """
    from PIL import Image

    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file()):
        with Image.open(file) as opened:
            picture = opened.convert("RGBA")
        side = min(picture.size)
        if side < size:
            continue
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        on_white = Image.new("RGBA", picture.size, "white")
        on_white.alpha_composite(picture)
        square = on_white.convert("RGB").crop((left, top, left + side, top + side))
        pixels = square.resize((size, size), Image.Resampling.LANCZOS).tobytes()
        yield torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(size, size, 3).permute(2, 0, 1) / 255


def jpeg_bytes(image_CHW: Tensor, quality: int = 95) -> int:
    """Size of the JPEG file that Pillow writes (4:2:0, standard Huffman tables) of [3, H, W] in [0, 1]."""
    from PIL import Image

    pixels_HWC = (image_CHW.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC.cpu().numpy()).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()


def rank_correlation(a_N: Tensor, b_N: Tensor) -> float:
    """Spearman's rho; ties share their mean rank."""
    return torch.corrcoef(torch.stack([_ranks(a_N), _ranks(b_N)]))[0, 1].item()


def _ranks(values_N: Tensor) -> Tensor:
    _, inverse_N, counts = torch.unique(values_N, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse_N].double()


def measure(folder: Path, size: int, limit: int) -> tuple[Tensor, Tensor]:
    """Features [N, 5] and true bytes [N], float64, of a folder's pictures at one size."""
    estimate, features, true_bytes = JpegSize(), [torch.empty(0, 5, dtype=torch.float64)], []
    for _, image_CHW in zip(range(limit), square_pictures(folder, size), strict=False):
        features.append(estimate.features(image_CHW[None]).double())
        true_bytes.append(jpeg_bytes(image_CHW))
    return torch.cat(features), torch.tensor(true_bytes, dtype=torch.float64)


def fit(sets: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Bits per feature, [5], for sets of (features [N, 5], true bytes [N])."""
    rows = [features / (8 * (size - _HEADER_BYTES))[:, None] / len(size) ** 0.5 for features, size in sets]
    goal = [torch.full_like(size, len(size) ** -0.5) for _, size in sets]
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(goal)[:, None]).solution[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256, 512], help="pixels")
    parser.add_argument("--limit", type=int, default=400, help="pictures per folder and size")
    arguments = parser.parse_args()

    pairs = [(folder, size) for folder in arguments.folders for size in arguments.sizes]
    measured = {pair: measure(*pair, arguments.limit) for pair in pairs}
    measured = {pair: data for pair, data in measured.items() if len(data[1]) >= _SMALLEST_SET}
    fitted = fit([(features[::2], size[::2]) for features, size in measured.values()])
    print("fitted bits per feature:", [round(bits, 2) for bits in fitted.tolist()])
    in_code = torch.tensor(_BITS_PER_FEATURE, dtype=torch.float64)
    for (folder, size), (features, true_bytes) in measured.items():
        for name, constants in (("fitted", fitted), ("in code", in_code)):
            estimate, truth = _HEADER_BYTES + features[1::2] @ constants / 8, true_bytes[1::2]
            error = estimate / truth - 1
            print(
                f"{folder.name:12} {size:4} px  n {len(truth):3}  {name:8} rank correlation "
                f"{rank_correlation(estimate, truth):.4f}  relative error: mean {error.mean():+.3f} "
                f"rms {error.square().mean().sqrt():.3f} largest {error.abs().max():.3f}"
            )


if __name__ == "__main__":
    main()
