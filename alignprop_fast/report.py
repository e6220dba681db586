"""What a run leaves to look at: pictures with captions, before and after, the reward curve, records line by line."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from alignprop_fast.files import whole, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

_CELL = 192  # pixels that a picture has in a grid, at least; small pictures are enlarged by a whole factor
_LARGEST_CELL = 512
MARGIN, LINE = 12, 19
INK, GREY, RULE = "#1d2430", "#6b7482", "#d9dde3"
BLUE, ORANGE, GREEN = "#2f6fde", "#e07b27", "#2f9e62"


@dataclass(frozen=True)
class Pictures:
    """Pictures, each with its prompt and seed; rewards: one each, or none where they are not known; mean_parts:
    the mean of each part of the reward."""

    images: tuple[Image.Image, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    rewards: tuple[float, ...] = ()
    mean_parts: dict[str, float] = field(default_factory=dict)

    def caption(self, index: int) -> str:
        """`0.712` or, where no reward is known, `seed 3`."""
        return f"{self.rewards[index]:.3f}" if self.rewards else f"seed {self.seeds[index]}"

    @property
    def mean_reward(self) -> float:
        return sum(self.rewards) / len(self.rewards) if self.rewards else math.nan


class JsonLines:
    """A file of JSON records, one a line, each with its "step". A process killed while writing leaves a torn last line
    at most, which reading leaves out, and a full disk none; numbers that are not finite are written as null."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record, on the disk when this returns."""
        end = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(_finite(record)) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, end)
            raise

    def read(self) -> list[dict[str, Any]]:
        """All whole records."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                record = json.loads(line) if line.endswith("\n") else None
            except ValueError:
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
        return records

    def keep_until(self, step: int) -> None:
        """Drop the records of later steps, and what is torn: a resumed run writes them anew."""
        kept = [record for record in self.read() if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_whole(self.path, text.encode())


def to_images(images_BCHW: Tensor) -> tuple[Image.Image, ...]:
    """images_BCHW: [B, 3, H, W] in [0, 1] -> B pictures of 8 bits a channel."""
    pixels_BHWC = (images_BCHW.detach().float().clamp(0, 1) * 255).round().permute(0, 2, 3, 1).cpu().numpy()
    return tuple(Image.fromarray(pixels_HWC.astype(np.uint8)) for pixels_HWC in pixels_BHWC)


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a PNG whole."""
    with whole(path) as temporary:
        image.save(temporary, format="PNG")


def save_grid(path: str | Path, pictures: Pictures, title: str) -> None:
    """A PNG with all pictures in rows, under each its prompt and its reward (or seed)."""
    images = enlarged(pictures.images)
    cells = [_cell([image], pictures.prompts[i], pictures.caption(i)) for i, image in enumerate(images)]
    save_image(_page(title, cells, columns=_columns(len(cells))), path)


def save_before_after(path: str | Path, before: Pictures, after: Pictures, title: str) -> None:
    """A PNG of pairs: each prompt and seed before (above) and after (below), with both rewards."""
    if (before.prompts, before.seeds) != (after.prompts, after.seeds):
        raise ValueError("before and after must show the same prompts and seeds")
    pairs = zip(enlarged(before.images), enlarged(after.images), strict=True)
    cells = [_pair(first, second, before, after, i) for i, (first, second) in enumerate(pairs)]
    save_image(_page(title, cells, columns=_columns(len(cells))), path)


def plot_rewards(path: str | Path, records: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]] = ()) -> None:
    """The reward over the optimizer steps as a PNG: every step, smoothed; each part, the distance to the base model and
    what is watched, where there are such, in panels of their own.

    records: lines of metrics.jsonl (step, reward_mean, reward_parts, base_mse). samples: step and reward_mean of the
    pictures with fixed prompts and seeds, where training's own prompts and noise do not blur what was learned, and
    "watch" (reward, diversity, parts).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [record for record in records if record.get("reward_mean") is not None]
    steps = [record["step"] for record in records]
    curves = [*_part_curves(steps, records), *_watch_curves(samples)]
    figure = Figure(figsize=(8, 4.2 + 1.9 * len(curves)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1 + len(curves), 1, sharex=True, squeeze=False, height_ratios=[2.2] + [1] * len(curves))[
        :, 0
    ]
    _curve(panels[0], steps, [record["reward_mean"] for record in records], BLUE, "training batch")
    if samples:
        values = [math.nan if record["reward_mean"] is None else record["reward_mean"] for record in samples]
        panels[0].plot(
            [record["step"] for record in samples],
            values,
            "D-",
            color=ORANGE,
            ms=5,
            lw=1.2,
            label="same prompts and seeds",
        )
    panels[0].set_title("Reward", loc="left", color=INK, fontweight="bold")
    panels[0].legend(frameon=False, labelcolor=INK, loc="best")
    for panel, (title, where, values, color) in zip(panels[1:], curves, strict=True):
        if where is steps:
            _curve(panel, where, values, color, title)
        else:  # the same pictures each time: nothing to smooth
            numbers = [math.nan if value is None else value for value in values]
            panel.plot(where, numbers, "D-", color=color, ms=4, lw=1.2)
            _style(panel)
        panel.set_title(title, loc="left", color=INK, fontsize=10)
    panels[-1].set_xlabel("optimizer step", color=INK)
    save_figure(figure, Path(path))


_Curve = tuple[str, list[int], list[float | None], str]  # title, steps, values, colour


def _part_curves(steps: list[int], records: Sequence[dict[str, Any]]) -> list[_Curve]:
    """Each part of a reward that has several, and the distance to the base model where it was measured."""
    names = list(dict.fromkeys(name for record in records for name in record.get("reward_parts", {})))
    curves: list[_Curve] = []
    for name in names if len(names) > 1 else []:
        values = [record.get("reward_parts", {}).get(name) for record in records]
        curves.append((f"{name} (unweighted)", steps, values, GREEN))
    distances = [record.get("base_mse") for record in records]
    if any(distance is not None for distance in distances):
        curves.append(("squared distance to the base model's output", steps, distances, GREY))
    return curves


def _watch_curves(samples: Sequence[dict[str, Any]]) -> list[_Curve]:
    """The watched reward, its parts and the diversity, where something was watched."""
    watched = [(record["step"], record["watch"]) for record in samples if record.get("watch")]
    if not watched:
        return []
    steps = [step for step, _ in watched]
    parts = list(dict.fromkeys(name for _, look in watched for name in look["parts"]))
    curves: list[_Curve] = [("watched, not trained for", steps, [look["reward"] for _, look in watched], ORANGE)]
    curves += [(f"watched: {name}", steps, [look["parts"].get(name) for _, look in watched], ORANGE) for name in parts]
    return [*curves, ("watched: diversity", steps, [look["diversity"] for _, look in watched], ORANGE)]


def smoothed(values: Sequence[float | None], share: float = 0.15) -> list[float]:
    """Exponential moving average over about `share` of the curve, without bias to the first value."""
    weight = math.exp(-1 / max(1.0, share * len(values) / 2))
    total = norm = 0.0
    result = []
    for value in values:
        if value is not None and math.isfinite(value):
            total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(total / norm if norm else math.nan)
    return result


def _curve(panel: Axes, steps: Sequence[int], values: Sequence[float | None], color: str, label: str) -> None:
    numbers = [math.nan if value is None else value for value in values]
    panel.plot(steps, numbers, ".", color=color, alpha=0.35, ms=7, mec="none")
    panel.plot(steps, smoothed(values), "-", color=color, lw=2, label=f"{label} (smoothed)")
    _style(panel)


def _style(panel: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.grid(axis="y", color=RULE, lw=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=GREY, labelcolor=INK, length=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(RULE)
    panel.margins(x=0.02)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole. Dollar signs in its texts, which may be a user's, are no formulas."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")


def enlarged(images: Iterable[Image.Image]) -> list[Image.Image]:
    """Small pictures by a whole factor, pixel by pixel, so that they stay crisp; large ones shrunk."""
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
    """Pictures one above the other, then the prompt in at most two lines, then a note in grey."""
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


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font of all pictures with text."""
    from matplotlib import get_data_path

    # matplotlib brings a font of its own, so that pictures look the same on every machine.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
