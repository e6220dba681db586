"""Fit the constants of `alignprop_fast.rewards.jpeg` to Pillow's byte counts and say how well the estimate does.

    python tests/rewards/calibrate_jpeg.py FOLDER [FOLDER ...] [--sizes 64 256 512] [--limit 400]

Each folder is one set of pictures, taken at each size; the fit uses every other picture, with equal weight for each set
and size, and minimises the squared relative error; the table is measured on the other half, once with the fitted
constants and once with those in the code. Those in the code come from the 12 photographs beside this script, 76
wallpapers (Debian packages mate-backgrounds, gnome-backgrounds, plasma-workspace-wallpapers), 400 stamps (Debian
tuxpaint-stamps-default) and 300 emoji (Noto, Fluent and Twemoji).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from alignprop_fast.rewards.jpeg import _BITS_PER_FEATURE, _HEADER_BYTES, JpegSize
from jpeg_truth import jpeg_bytes, rank_correlation, square_pictures


def measure(folder: Path, size: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 5] and true bytes [N] of a folder's pictures at one size."""
    estimate, features, true_bytes = JpegSize(), [], []
    for _, picture in zip(range(limit), square_pictures(folder, size), strict=False):
        image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255
        features.append(estimate.features(image)[0].double().numpy())
        true_bytes.append(jpeg_bytes(picture))
    return np.array(features).reshape(-1, 5), np.array(true_bytes)


def fit(sets: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Bits per feature, [5]."""
    rows = [features / (8 * (size - _HEADER_BYTES))[:, None] / len(size) ** 0.5 for features, size in sets]
    goal = [np.full(len(size), len(size) ** -0.5) for _, size in sets]
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(goal), rcond=None)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256, 512])
    parser.add_argument("--limit", type=int, default=400, help="pictures per folder and size")
    arguments = parser.parse_args()

    pairs = [(folder, size) for folder in arguments.folders for size in arguments.sizes]
    measured = {pair: measure(*pair, arguments.limit) for pair in pairs}
    measured = {pair: data for pair, data in measured.items() if len(data[1]) >= 4}
    fitted = fit([(features[::2], size[::2]) for features, size in measured.values()])
    print("fitted bits per feature:", np.round(fitted, 2))
    for (folder, size), (features, true_bytes) in measured.items():
        for name, constants in (("fitted", fitted), ("in code", np.array(_BITS_PER_FEATURE))):
            estimate, truth = _HEADER_BYTES + features[1::2] @ constants / 8, true_bytes[1::2]
            error = estimate / truth - 1
            print(
                f"{folder.name:12} {size:4} px  n {len(truth):3}  {name:8} rank correlation "
                f"{rank_correlation(estimate, truth):.4f}  relative error: mean {error.mean():+.3f} "
                f"rms {np.sqrt((error**2).mean()):.3f} largest {np.abs(error).max():.3f}"
            )


if __name__ == "__main__":
    main()
